package agent

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

func TestRunRefusesToStart(t *testing.T) {
	l := &lab{t: t}
	l.addNodes()
	a := l.nodes["a"]
	good := Options{NodeName: "a", Config: &rest.Config{Host: "127.0.0.1:1"}, PeerListen: "127.0.0.1:0", TLS: a.files, Host: a.host}
	for name, tt := range map[string]struct {
		change func(*Options)
		want   string
	}{
		"no node":                  {func(o *Options) { o.NodeName = "" }, "node name"},
		"bad node":                 {func(o *Options) { o.NodeName = "a b" }, "cannot be a label's value"},
		"no API server":            {func(o *Options) { o.Config = nil }, "no API server"},
		"no host":                  {func(o *Options) { o.Host = nil }, "no host"},
		"nowhere to listen":        {func(o *Options) { o.PeerListen = "" }, "no address to listen at"},
		"another node's key":       {func(o *Options) { o.TLS = l.nodes["b"].files }, "is that of node b, this is a"},
		"wildcard, not advertised": {func(o *Options) { o.PeerListen = ":0" }, "advertise one"},
		"advertises no port":       {func(o *Options) { o.PeerAdvertise = "10.0.0.1" }, "advertised address"},
		"advertises no host":       {func(o *Options) { o.PeerAdvertise = "[]:9443" }, "names no host"},
	} {
		o := good
		tt.change(&o)
		if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error containing %q", name, err, tt.want)
		}
	}
}

// TestAdvertised: what the DaemonSet says is an address whichever family the
// node's is of.
func TestAdvertised(t *testing.T) {
	manifest, err := os.ReadFile(filepath.Join("..", "config", "agent", "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const flag = "- --peer-advertise="
	_, value, found := strings.Cut(string(manifest), flag)
	if !found {
		t.Fatalf("config/agent sets no %s", flag)
	}
	value, _, _ = strings.Cut(value, "\n")
	for ip, want := range map[string]string{"192.0.2.1": "192.0.2.1:9443", "2001:db8::1": "[2001:db8::1]:9443"} {
		got, err := advertised(strings.ReplaceAll(value, "$(HOST_IP)", ip), &net.TCPAddr{Port: 1})
		if err != nil || got != want {
			t.Errorf("%s on a node at %s: %q, %v, want %s", value, ip, got, err, want)
		}
	}
}
