package proto

import (
	"bufio"
	"fmt"
	"io"
)

// Serve reads requests from port and answers each with what handle returns,
// one after the other, until port fails; it returns that failure. What is not
// a request is skipped.
func Serve(port io.ReadWriter, handle func(Request) Response) error {
	lines := bufio.NewReaderSize(port, MaxRequest)
	for {
		line, err := readLine(lines)
		if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		var request Request
		if !parse(line, &request) || request.Op == "" {
			continue
		}
		response := handle(request)
		response.ID, response.To = request.ID, request.Op
		out, err := format(response)
		if err != nil {
			return fmt.Errorf("answering %s: %w", request.Op, err)
		}
		if _, err := port.Write(out); err != nil {
			return fmt.Errorf("answering %s: %w", request.Op, err)
		}
	}
}
