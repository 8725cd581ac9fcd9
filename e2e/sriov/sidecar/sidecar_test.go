//go:build e2esriov

package sidecar

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// child is set for the program that TestStart starts, which is this one: a node
// of these tests has no other.
const child = "COMPSC_SIDECAR_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(child) != "" {
		_, err := io.Copy(io.Discard, os.Stdin) // until TestStart has seen it
		if err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestStart(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{child + "=1"}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
			t.Error(err)
		}
	}()
	if err := Check(cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	// This process gave nothing up.
	if err := Check(os.Getpid()); err == nil || strings.Contains(err.Error(), `NoNewPrivs is "1"`) {
		t.Errorf("of root: %v", err)
	} else {
		for _, what := range []string{"Uid", "Gid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs"} {
			if !strings.Contains(err.Error(), ": "+what+" is ") {
				t.Errorf("%s of root is not told: %v", what, err)
			}
		}
	}
}

func TestCheckNobody(t *testing.T) {
	if err := Check(1 << 30); err == nil {
		t.Error("a process that is not there has no privileges")
	}
}
