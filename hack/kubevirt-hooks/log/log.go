// Package log stands in for kubevirt.io/client-go/log, as far as the files taken
// from KubeVirt use it. It writes to standard error.
package log

import (
	"fmt"
	"os"
)

// Logger is what can be logged with.
type Logger struct{}

// Log is the one logger.
var Log Logger

// Object returns the logger for an object.
func (l Logger) Object(any) Logger { return l }

// V returns the logger of a verbosity.
func (l Logger) V(int) Logger { return l }

// Reason returns the logger for an error.
func (l Logger) Reason(error) Logger { return l }

// Infof logs.
func (Logger) Infof(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Warningf logs.
func (Logger) Warningf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Errorf logs.
func (Logger) Errorf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Info logs.
func (Logger) Info(text string) { fmt.Fprintln(os.Stderr, text) }

// Error logs.
func (Logger) Error(text string) { fmt.Fprintln(os.Stderr, text) }

// Warning logs.
func (Logger) Warning(text string) { fmt.Fprintln(os.Stderr, text) }
