package nodehook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook/hookpb"
)

const waitLimit = 20 * time.Second

type handlerFunc func(context.Context, *Call) error

func (f handlerFunc) NodeHook(ctx context.Context, c *Call) error { return f(ctx, c) }

func vmi(change ...func(*virtv1.VirtualMachineInstance)) []byte {
	v := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "vm", UID: "vmi-uid"}}
	v.Spec.Domain.Devices.Interfaces = []virtv1.Interface{{Name: "fast", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}}}
	v.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "migration-uid"}
	for _, f := range change {
		f(v)
	}
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return text
}

func request(p Point, vmi []byte) *hookpb.ExecuteNodeHookRequest {
	return &hookpb.ExecuteNodeHookRequest{HookPoint: string(p), Vmi: vmi, NodeContext: &hookpb.NodeContext{NodeName: "node-a"}}
}

// serve serves the hooks at a socket until the test ends or stop is called.
func serve(t *testing.T, path string, limit time.Duration, h handlerFunc) (stop func()) {
	t.Helper()
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer("node-a", h, slog.New(slog.DiscardHandler))
	s.limit = limit
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(waitLimit):
				t.Error("the server does not stop")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func call(path string, r *hookpb.ExecuteNodeHookRequest) error {
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	_, err = hookpb.NewNodeHookServiceClient(conn).ExecuteNodeHook(ctx, r)
	return err
}

func socket(t *testing.T) string { return filepath.Join(t.TempDir(), "plugins", "compsc.sock") }

func TestRequests(t *testing.T) {
	var got *Call
	path := socket(t)
	serve(t, path, time.Second, func(_ context.Context, c *Call) error { got = c; return nil })
	unbound := func(v *virtv1.VirtualMachineInstance) { v.Spec.Domain.Devices.Interfaces = nil }
	for name, tc := range map[string]struct {
		request *hookpb.ExecuteNodeHookRequest
		code    codes.Code
		text    string
		asked   bool
	}{
		"start":              {request(PreVMStart, vmi()), codes.OK, "", true},
		"migration":          {request(PreMigrationSource, vmi()), codes.OK, "", true},
		"no VF":              {request(PreVMStart, vmi(unbound)), codes.OK, "", false},
		"no VF, wrong point": {request("Sometimes", vmi(unbound)), codes.OK, "", false},
		"unknown point":      {request("PostMigrationSource", vmi()), codes.Unimplemented, `hook point "PostMigrationSource"`, false},
		"long point":         {request(Point(strings.Repeat("x", 10000)), vmi()), codes.Unimplemented, `"` + strings.Repeat("x", maxPoint) + `"`, false},
		"no point":           {request("", vmi()), codes.Unimplemented, `hook point ""`, false},
		"no VMI":             {request(PreVMStart, nil), codes.InvalidArgument, "not the expected JSON", false},
		"not JSON":           {request(PreVMStart, []byte("<xml/>")), codes.InvalidArgument, "not the expected JSON", false},
		"too large":          {request(PreVMStart, make([]byte, maxMessage+1)), codes.ResourceExhausted, "", false},
		"no UID":             {request(PreVMStart, vmi(func(v *virtv1.VirtualMachineInstance) { v.UID = "" })), codes.InvalidArgument, "no name, namespace or UID", false},
		"no migration": {request(PreMigrationTarget, vmi(func(v *virtv1.VirtualMachineInstance) { v.Status.MigrationState = nil })),
			codes.InvalidArgument, "no status.migrationState.migrationUid", false},
		"another node": {&hookpb.ExecuteNodeHookRequest{HookPoint: string(PreVMStart), Vmi: vmi(), NodeContext: &hookpb.NodeContext{NodeName: "node-b"}},
			codes.FailedPrecondition, "node node-a", false},
		"no node": {&hookpb.ExecuteNodeHookRequest{HookPoint: string(PreVMStart), Vmi: vmi()}, codes.FailedPrecondition, "node node-a", false},
	} {
		t.Run(name, func(t *testing.T) {
			got = nil
			err := call(path, tc.request)
			if status.Code(err) != tc.code || err != nil && !strings.Contains(err.Error(), tc.text) {
				t.Errorf("answer %v, want %s with %q", err, tc.code, tc.text)
			}
			if asked := got != nil; asked != tc.asked {
				t.Errorf("asked: %v, want %v", asked, tc.asked)
			}
		})
	}
	if err := call(path, request(PostVMStart, vmi())); err != nil || got.Migration != "" || got.VMI.Name != "vm" || got.Point != PostVMStart {
		t.Errorf("%v, %+v", err, got)
	}
	if err := call(path, request(PostMigrationTarget, vmi())); err != nil || got.Migration != "migration-uid" {
		t.Errorf("%v, %+v", err, got)
	}
}

func TestAnswers(t *testing.T) {
	var answer error
	path := socket(t)
	serve(t, path, 50*time.Millisecond, func(ctx context.Context, _ *Call) error {
		switch {
		case answer == nil:
			panic("of a handler")
		case errors.Is(answer, context.DeadlineExceeded):
			<-ctx.Done()
			return ctx.Err()
		case errors.Is(answer, errIgnores):
			<-t.Context().Done() // what a bound is there for
		}
		return answer
	})
	for _, tc := range []struct {
		answer error
		code   codes.Code
		text   string
	}{
		{nil, codes.Internal, "internal error"},
		{status.Error(codes.FailedPrecondition, "aborted"), codes.FailedPrecondition, "aborted"},
		{errors.New("something"), codes.Unavailable, "something"},
		{context.DeadlineExceeded, codes.Unavailable, "could not tell in 50ms"},
		{errIgnores, codes.Unavailable, "has not answered in 50ms"},
	} {
		answer = tc.answer
		begin := time.Now()
		err := call(path, request(PreVMStart, vmi()))
		if status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("answer %v, want %s with %q", err, tc.code, tc.text)
		}
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%v took %s", tc.answer, took)
		}
	}
}

var errIgnores = errors.New("ignores its context")

// Calls that are repeated while one is under way share its answer; others do not.
func TestRepeats(t *testing.T) {
	var calls atomic.Int32
	under, release := make(chan struct{}, 8), make(chan struct{})
	seen := 0
	path := socket(t)
	serve(t, path, waitLimit, func(_ context.Context, _ *Call) error {
		calls.Add(1)
		under <- struct{}{}
		<-release
		return status.Error(codes.Unavailable, "not yet")
	})
	other := func(v *virtv1.VirtualMachineInstance) { v.Status.MigrationState.MigrationUID = "other" }
	requests := []*hookpb.ExecuteNodeHookRequest{
		request(PreMigrationSource, vmi()), request(PreMigrationSource, vmi()), request(PreMigrationSource, vmi()),
		request(PreMigrationTarget, vmi()), request(PreMigrationSource, vmi(other)),
	}
	answers := make(chan error, len(requests))
	for i, r := range requests {
		go func() { answers <- call(path, r) }()
		if i == 0 || i > 2 {
			for range max(1, i-1) - seen {
				select {
				case <-under:
					seen++
				case <-time.After(waitLimit):
					t.Fatal("the call does not come")
				}
			}
		}
	}
	close(release)
	for range requests {
		if err := <-answers; status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	}
	// The repeats may have come after the answer, and are calls of their own then.
	if n := calls.Load(); n < 3 || n > 5 {
		t.Errorf("%d calls", n)
	}
}

func TestRestart(t *testing.T) {
	path := socket(t)
	stop := serve(t, path, time.Second, func(context.Context, *Call) error { return nil })
	// A successor takes the socket over while the predecessor still ends.
	serve(t, path, time.Second, func(context.Context, *Call) error { return status.Error(codes.Aborted, "the second") })
	stop()
	if err := call(path, request(PreVMStart, vmi())); status.Code(err) != codes.Aborted {
		t.Errorf("the successor does not answer: %v", err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
}

func TestListen(t *testing.T) {
	path := socket(t)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_ = l.Close()
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "is no socket; remove it") {
		t.Errorf("error %v", err)
	}
	if _, err := Listen(filepath.Join(path, "s")); err == nil {
		t.Error("a file taken for a directory")
	}
}

// TestPeer connects as another user, who could reach the socket. It runs this
// test again in a process of that user.
func TestPeer(t *testing.T) {
	const variable = "COMPSC_TEST_HOOK_SOCKET"
	if path := os.Getenv(variable); path != "" {
		fmt.Println("answer:", status.Code(call(path, request(PreVMStart, vmi()))))
		return
	}
	if os.Getuid() != 0 {
		// Then this process is the other user.
		path := socket(t)
		serve(t, path, time.Second, func(context.Context, *Call) error { return nil })
		if err := call(path, request(PreVMStart, vmi())); status.Code(err) != codes.Unavailable {
			t.Errorf("uid %d is served: %v", os.Getuid(), err)
		}
		return
	}
	dir, err := os.MkdirTemp("", "hooks") // t.TempDir is in a directory that only root enters
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	var asked atomic.Bool
	serve(t, path, time.Second, func(context.Context, *Call) error { asked.Store(true); return nil })
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "test")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]string{65534: "answer: Unavailable", 0: "answer: OK"} {
		asked.Store(false)
		ctx, cancel := context.WithTimeout(t.Context(), 2*waitLimit)
		defer cancel()
		cmd := exec.CommandContext(ctx, exe, "-test.run=^TestPeer$")
		cmd.Env, cmd.Dir = append(os.Environ(), variable+"="+path), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) || asked.Load() != (uid == 0) {
			t.Errorf("uid %d: asked %v, %v, %s", uid, asked.Load(), err, out)
		}
	}
}

func TestCredentialsOfOtherConnections(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := (rootOnly{}).ServerHandshake(a); err == nil {
		t.Error("a connection that tells nothing of its peer is served")
	}
	if _, _, err := (rootOnly{}).ClientHandshake(t.Context(), "", a); err == nil {
		t.Error("a client's handshake succeeds")
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(string(PreVMStart), vmi(), "node-a")
	f.Add(string(PreMigrationSource), vmi(), "node-b")
	f.Add("x", []byte(`{"spec":null,"status":{"migrationState":{}}}`), "")
	f.Add("", []byte(`[]`), "")
	s := NewServer("node-a", handlerFunc(func(context.Context, *Call) error { return nil }), slog.New(slog.DiscardHandler))
	f.Fuzz(func(t *testing.T, point string, vmi []byte, node string) {
		c, err := s.parse(&hookpb.ExecuteNodeHookRequest{HookPoint: point, Vmi: vmi, NodeContext: &hookpb.NodeContext{NodeName: node}})
		if err != nil || c == nil {
			return
		}
		if c.VMI.UID == "" || node != "node-a" || migrationPoints[c.Point] != (c.Migration != "") {
			t.Fatalf("accepted %+v", c)
		}
	})
}
