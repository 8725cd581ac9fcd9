package proto

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
)

// readLine returns the next line, without its end, that fits into the reader's
// buffer; it skips longer ones. The line is valid until the next call.
func readLine(r *bufio.Reader) ([]byte, error) {
	for {
		line, err := r.ReadSlice('\n')
		if err == nil {
			return bytes.TrimRight(line, "\r\n"), nil
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = r.ReadSlice('\n')
		}
		if err != nil {
			return nil, err
		}
	}
}

// parse decodes a line into v. Bytes in front of the object, as a line that
// lost its beginning has them, are skipped.
func parse(line []byte, v any) bool {
	start := bytes.IndexByte(line, '{')
	return start >= 0 && json.Unmarshal(line[start:], v) == nil
}

// format encodes v as a line. The empty line before it ends whatever the other
// side has of an earlier line.
func format(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	line := append(make([]byte, 0, len(body)+2), '\n')
	return append(append(line, body...), '\n'), nil
}
