package kubectl

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"compsc.io/compsc/api/v1alpha1"
)

// terminal opens a pseudo-terminal of that width: what a program writes to is
// returned first, what a person sees can be read from the other.
func terminal(t *testing.T, width uint16) (program, person *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	fd := int(person.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatalf("unlock the pseudo-terminal: %v", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatalf("number of the pseudo-terminal: %v", err)
	}
	if program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: width}); err != nil {
		t.Fatal(err)
	}
	return program, person
}

// TestColumns: only a terminal has a width, and not every character device is one.
func TestColumns(t *testing.T) {
	t.Setenv("TERM", "xterm")
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	wide, _ := terminal(t, 100)
	serial, _ := terminal(t, 0)
	if got := columns(null); got != 0 {
		t.Errorf("%s is a terminal of %d columns", os.DevNull, got)
	}
	if got := columns(&bytes.Buffer{}); got != 0 {
		t.Errorf("a buffer is a terminal of %d columns", got)
	}
	if got := columns(wide); got != 100 {
		t.Errorf("a terminal of 100 columns has %d", got)
	}
	if got := columns(serial); got != 80 {
		t.Errorf("a terminal of unknown width has %d columns, want 80", got)
	}
	t.Setenv("TERM", "dumb")
	if got := columns(wide); got != 0 {
		t.Errorf("a dumb terminal has %d columns", got)
	}
}

// TestLiveLine: on a terminal one line is overwritten, and stays one where it
// is narrow.
func TestLiveLine(t *testing.T) {
	t.Setenv("TERM", "xterm")
	for width, want := range map[uint16]string{
		100: "\r\x1b[Kmove: Pinning      node-a -> ?  5s\r\x1b[Kmove: Succeeded    node-a -> node-b  5s\r\n",
		20:  "\r\x1b[Kmove: Pinning      \r\x1b[Kmove: Succeeded    \r\n",
	} {
		program, person := terminal(t, width)
		stages := []*v1alpha1.VFMigration{moving(), moved()}
		scheme := runtime.NewScheme()
		if err := v1alpha1.AddToScheme(scheme); err != nil {
			t.Fatal(err)
		}
		c := fake.NewClientBuilder().WithScheme(scheme).WithInterceptorFuncs(interceptor.Funcs{
			Get: func(_ context.Context, _ client.WithWatch, _ client.ObjectKey, o client.Object, _ ...client.GetOption) error {
				stages[0].DeepCopyInto(o.(*v1alpha1.VFMigration))
				stages = stages[1:]
				return nil
			},
		}).Build()
		p := &plugin{clock: clocktesting.NewFakePassiveClock(began.Add(5 * time.Second)), poll: time.Millisecond}
		cmd := p.command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(program)
		cmd.SetContext(t.Context())
		if err := p.follow(cmd, c, moving(), time.Minute); err != nil {
			t.Fatal(err)
		}
		// Once nobody can write to it any more, reading ends with an error.
		if err := program.Close(); err != nil {
			t.Fatal(err)
		}
		shown, err := io.ReadAll(person)
		if got := string(shown); got != want {
			t.Errorf("a terminal of %d columns shows\n%q, want\n%q (%v)", width, got, want, err)
		}
		if out.String() != timeline {
			t.Errorf("its output is %q", out.String())
		}
	}
}
