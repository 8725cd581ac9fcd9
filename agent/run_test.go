package agent

import (
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
	} {
		o := good
		tt.change(&o)
		if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error containing %q", name, err, tt.want)
		}
	}
}
