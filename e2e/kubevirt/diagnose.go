package kubevirt

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Diagnose is what one wants to know when something went wrong, in text.
func (s *Stack) Diagnose(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var b strings.Builder
	for _, c := range []string{
		"get nodes,pods -A -o wide",
		"get vfnode,vfm,vmi,vmim -A -o wide",
		"describe vmi,vmim,vfm -A",
		"describe kubevirts,pods -n " + kubevirtNamespace,
		"get events -A --sort-by=.lastTimestamp",
		"logs -n compsc-system -l app.kubernetes.io/component=manager --prefix --tail=30",
		"logs -n compsc-system -l app.kubernetes.io/component=agent --prefix --tail=60",
		"logs -n kube-system -l app=sriov-device-plugin-standin --prefix --tail=10",
		"logs -n " + Namespace + " -l kubevirt.io=virt-launcher --all-containers --prefix --tail=60",
	} {
		out, err := s.Kubectl(ctx, "", strings.Fields(c)...)
		fmt.Fprintf(&b, "--- kubectl %s\n%s\n", c, out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}
