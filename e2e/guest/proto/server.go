package proto

import (
	"bufio"
	"fmt"
	"io"
)

// Serve reads requests from port and answers each with what handle returns,
// one after the other, until port fails; it returns that failure. What is not
// a request is skipped. A request that repeats the one before it gets the same
// answer again.
func Serve(port io.ReadWriter, handle func(Request) Response) error {
	lines := bufio.NewReaderSize(port, MaxRequest)
	var last Response
	for {
		line, err := readLine(lines)
		if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		var request Request
		if !parse(line, &request) || request.Op == "" {
			continue
		}
		if last.ID != request.ID || last.To != request.Op {
			last = handle(request)
			last.ID, last.To = request.ID, request.Op
		}
		out, err := format(last)
		if err != nil {
			return fmt.Errorf("answering %s: %w", request.Op, err)
		}
		if _, err := port.Write(out); err != nil {
			return fmt.Errorf("answering %s: %w", request.Op, err)
		}
	}
}
