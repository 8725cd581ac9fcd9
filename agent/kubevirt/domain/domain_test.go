package domain

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"libvirt.org/go/libvirtxml"

	"compsc.io/compsc/agent/kubevirt"
)

var config = Config{
	VFs: []VF{
		{Name: "fast", MAC: "52:54:00:00:00:01", Slot: 0x10, Socket: "/var/run/kubevirt-hooks/hook-sidecar-0/compsc/vf10.sock"},
		{Name: "faster_2", Slot: 0x11, Socket: "/var/run/kubevirt-hooks/hook-sidecar-0/compsc/vf11.sock"},
	},
	Gate:    "/var/run/kubevirt-hooks/hook-sidecar-0/compsc/gate.sock",
	Monitor: "/var/run/kubevirt-hooks/hook-sidecar-0/compsc/qmp.sock",
}

// added are the interfaces by which KubeVirt knows the VFs of config.
const added = `<interface type="udp"><mac address="52:54:00:00:00:01"></mac>` +
	`<source address="127.86.70.1" port="9"><local address="127.86.70.1" port="58870"></local></source>` +
	`<model type="virtio-non-transitional"></model><rom enabled="no"></rom><alias name="ua-fast"></alias>` +
	`<address type="pci" domain="0x0000" bus="0x00" slot="0x18" function="0x1"></address></interface>` +
	`<interface type="udp"><source address="127.86.70.2" port="9"><local address="127.86.70.2" port="58870"></local></source>` +
	`<model type="virtio-non-transitional"></model><rom enabled="no"></rom><alias name="ua-faster_2"></alias>` +
	`<address type="pci" domain="0x0000" bus="0x00" slot="0x18" function="0x2"></address></interface>`

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".xml"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parts is what a document says: elements, attributes and texts with their
// paths, in its order, without those below the paths that skip names.
func parts(t testing.TB, doc []byte, skip ...string) []string {
	t.Helper()
	var out, path []string
	dec := xml.NewDecoder(bytes.NewReader(doc))
	for {
		tok, err := dec.Token()
		if tok == nil {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		add := func(s string) {
			at := strings.Join(path, "/")
			if !slices.ContainsFunc(skip, func(s string) bool { return strings.HasPrefix(at, s) }) {
				out = append(out, at+s)
			}
		}
		switch e := tok.(type) {
		case xml.StartElement:
			path = append(path, e.Name.Local)
			add("")
			for _, a := range e.Attr {
				add("@" + a.Name.Local + "=" + a.Value)
			}
		case xml.CharData:
			if s := strings.TrimSpace(string(e)); s != "" {
				add("=" + s)
			}
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
}

// TestDefine: of what KubeVirt made nothing is lost, and the VFs' parts are
// there, once, however often it is done.
func TestDefine(t *testing.T) {
	for _, name := range []string{"kernel-boot", "rich", "hugepages", "root-complex"} {
		t.Run(name, func(t *testing.T) {
			in := read(t, name)
			out, err := Define(in, config)
			if err != nil {
				t.Fatal(err)
			}
			changed := []string{"domain/memoryBacking", "domain/commandline"}
			rest, added := out, []byte(added)
			if at := bytes.Index(out, added); at < 0 || bytes.Count(out, added) != 1 {
				t.Errorf("the interfaces are not there, once, but: %s", out)
			} else {
				rest = slices.Concat(out[:at], out[at+len(added):])
			}
			if d := cmp.Diff(parts(t, in, changed...), parts(t, rest, changed...)); d != "" {
				t.Errorf("other parts (-in +out):\n%s", d)
			}
			again, err := Define(out, config)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(out), string(again)); d != "" {
				t.Errorf("done again (-once +twice):\n%s", d)
			}
			d := &libvirtxml.Domain{}
			if err := d.Unmarshal(string(out)); err != nil {
				t.Fatal(err)
			}
			m := d.MemoryBacking
			if m.MemorySource.Type != "memfd" || m.MemoryAccess.Mode != "shared" || m.MemoryAllocation.Mode != "immediate" || (m.MemoryHugePages != nil) != (name == "hugepages") {
				t.Errorf("memoryBacking is %+v", m)
			}
			want := []string{
				"-blockdev", `{"driver":"nbd","export":"","node-name":"compsc-nbd","reconnect-delay":3,"server":{"path":"/var/run/kubevirt-hooks/hook-sidecar-0/compsc/gate.sock","type":"unix"}}`,
				"-blockdev", `{"driver":"qcow2","file":"compsc-nbd","node-name":"compsc-gate"}`,
				"-chardev", "socket,id=compsc-qmp,path=/var/run/kubevirt-hooks/hook-sidecar-0/compsc/qmp.sock,server=on,wait=off",
				"-mon", "chardev=compsc-qmp,mode=control",
				"-device", `{"addr":"0x10","bus":"pcie.0","driver":"vfio-user-pci","id":"compsc-vf10","rombar":0,"socket":{"path":"/var/run/kubevirt-hooks/hook-sidecar-0/compsc/vf10.sock","type":"unix"},"x-msg-timeout":120000}`,
				"-device", `{"addr":"0x11","bus":"pcie.0","driver":"vfio-user-pci","id":"compsc-vf11","rombar":0,"socket":{"path":"/var/run/kubevirt-hooks/hook-sidecar-0/compsc/vf11.sock","type":"unix"},"x-msg-timeout":120000}`,
			}
			if name == "rich" {
				want = append([]string{"-fw_cfg", "name=opt/com.coreos/config,file=/var/run/libvirt/ignition-dir/default/vm/data.ign"}, want...)
			}
			var got []string
			for _, a := range d.QEMUCommandline.Args {
				got = append(got, a.Value)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("arguments (-want +got):\n%s", d)
			}
		})
	}
}

// TestSharedMemoryStays: what asks for shared memory already is not doubled.
func TestSharedMemoryStays(t *testing.T) {
	in := bytes.Replace(read(t, "hugepages"), []byte(`<source type="memfd"></source>`), []byte(`<source type="memfd"/><access mode="shared"/><allocation threads="2" mode="ondemand"/><nosharepages/>`), 1)
	out, err := Define(in, config)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(out, []byte("<memoryBacking")); n != 1 || !bytes.Contains(out, []byte("<nosharepages>")) ||
		!bytes.Contains(out, []byte(`<allocation mode="immediate" threads="2">`)) {
		t.Errorf("%d elements memoryBacking in:\n%s", n, out)
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		file     string
		old, new string // replaced in the file
		config   func(*Config)
		want     string
	}{
		"huge pages without memfd": {file: "hugepages-no-memfd", want: `remove the annotation kubevirt.io/memfd: "false"`},
		"private huge pages":       {file: "hugepages", old: `<source type="memfd"></source>`, new: `<source type="memfd"/><access mode="private"/>`, want: `access of mode "private"`},
		"file memory":              {file: "hugepages", old: `type="memfd"`, new: `type="file"`, want: `source of type "file"`},
		"private NUMA cell":        {file: "hugepages", old: `<cell id="0"`, new: `<cell id="0" memAccess="private"`, want: "NUMA cell 0 is private"},
		"private memory device":    {file: "kernel-boot", old: "<rng ", new: `<memory model="dimm" access="private"/><rng `, want: "a memory device is private"},
		"i440fx":                   {file: "kernel-boot", old: `machine="q35"`, new: `machine="pc-i440fx-9.2"`, want: `machine "pc-i440fx-9.2" of architecture "x86_64"`},
		"arm":                      {file: "kernel-boot", old: `arch="x86_64"`, new: `arch="aarch64"`, want: `of architecture "aarch64"`},
		"Xen":                      {file: "kernel-boot", old: `type="qemu"`, new: `type="xen"`, want: `domain type "xen"`},
		"encrypted memory":         {file: "kernel-boot", old: "</domain>", new: `<launchSecurity type="sev"><policy>0x1</policy></launchSecurity></domain>`, want: "remove spec.domain.launchSecurity"},
		"IOMMU":                    {file: "kernel-boot", old: "<rng ", new: `<iommu model="intel"/><rng `, want: "remove the IOMMU"},
		"PCI address taken": {file: "root-complex", old: `slot="0x05"`, new: `slot="0x11"`,
			want: "PCI address 0000:00:11.0 of the guest, where a VF is to be, is that of a rng"},
		"PCI address of an interface taken": {file: "kernel-boot", old: "<rng ", new: `<interface type="user"><address type="pci" bus="0x00" slot="0x10"/></interface><rng `,
			want: "PCI address 0000:00:10.0 of the guest, where a VF is to be, is that of a network interface"},
		"empty device taken": {file: "root-complex", old: `slot="0x05"`, new: `slot="0x18"`,
			want: "PCI address 0000:00:18.0 of the guest, which must stay empty, is that of a rng"},
		"empty device asked for": {file: "kernel-boot", config: func(c *Config) { c.VFs[0].Slot = 0x18 }, want: "must stay empty, is that of a VF"},
		"PCI address unreadable": {file: "root-complex", old: `slot="0x05"`, new: `slot="five"`, want: "domain XML"},
		"no domain":              {file: "kernel-boot", old: "<domain", new: "<network", want: "domain XML"},
		"cut off":                {file: "kernel-boot", old: "</domain>", new: "", want: "domain XML"},
		"two memory backings":    {file: "hugepages", old: "<os>", new: "<memoryBacking/><os>", want: "two elements memoryBacking"},
		"no devices":             {file: "kernel-boot", old: "<devices>", new: "<devices/><device>", want: "domain XML"},
		"devices twice":          {file: "kernel-boot", old: "<devices>", new: "<devices></devices><devices>", want: "two elements devices"},
		"no name":                {file: "kernel-boot", config: func(c *Config) { c.VFs[1].Name = "" }, want: `"" is not the name of an interface`},
		"same name":              {file: "kernel-boot", config: func(c *Config) { c.VFs[1].Name = "fast" }, want: `"fast" is not the name of an interface, or given twice`},
		"too many":               {file: "kernel-boot", config: func(c *Config) { c.VFs = make([]VF, 15) }, want: "15 VFs for the domain, at most 14"},
		"no VF":                  {file: "kernel-boot", config: func(c *Config) { c.VFs = nil }, want: "no VF"},
		"same slot":              {file: "kernel-boot", config: func(c *Config) { c.VFs[1].Slot = 0x10 }, want: "given twice"},
		"slot 32":                {file: "kernel-boot", config: func(c *Config) { c.VFs[1].Slot = 32 }, want: "PCI slot 0x20"},
		"comma":                  {file: "kernel-boot", config: func(c *Config) { c.Monitor = "/a,b" }, want: `"/a,b" is not`},
		"long path":              {file: "kernel-boot", config: func(c *Config) { c.Gate = "/" + strings.Repeat("a", 107) }, want: "at most 107 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			in := read(t, c.file)
			if c.old != "" {
				changed := bytes.Replace(in, []byte(c.old), []byte(c.new), 1)
				if bytes.Equal(changed, in) {
					t.Fatalf("the file has no %s", c.old)
				}
				in = changed
			}
			cfg := config
			cfg.VFs = slices.Clone(config.VFs)
			if c.config != nil {
				c.config(&cfg)
			}
			if _, err := Define(in, cfg); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	// A host device's own address is the host's.
	in := bytes.Replace(read(t, "kernel-boot"), []byte("<rng "), []byte(`<hostdev mode="subsystem" type="pci"><source><address domain="0x0000" bus="0x00" slot="0x10" function="0x0"/></source></hostdev><rng `), 1)
	if _, err := Define(in, config); err != nil {
		t.Errorf("a host device: %v", err)
	}
	// Other buses have slots of their own.
	in = bytes.Replace(read(t, "root-complex"), []byte(`bus="0x00" slot="0x05"`), []byte(`bus="0x01" slot="0x10"`), 1)
	if _, err := Define(in, config); err != nil {
		t.Errorf("a device on bus 1: %v", err)
	}
}

// TestOtherArgumentsStay: only arguments of our own are replaced.
func TestOtherArgumentsStay(t *testing.T) {
	in := []string{"-device", `{"driver":"edu","id":"edu0"}`, "-chardev", "null,id=c", "-S", "-device", "-device",
		"-device", `{"driver":"x","id":"compsc-vf05"}`, "-blockdev", "driver=null-co,node-name=n", "-mon", "chardev=compsc-qmp"}
	var args []libvirtxml.DomainQEMUCommandlineArg
	for _, a := range in {
		args = append(args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
	var got []string
	for _, a := range foreign(args) {
		got = append(got, a.Value)
	}
	want := append(slices.Clone(in[:7]), in[9:11]...)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestInterfacesOfOthers: only an interface with a VF's alias is replaced, and
// KubeVirt's, which it makes for a binding with a domainAttachmentType, is.
func TestInterfacesOfOthers(t *testing.T) {
	const (
		others = `<interface type="ethernet"><alias name="ua-default"/><address type="pci" domain="0x0000" bus="0x01" slot="0x10" function="0x0"/></interface>`
		tap    = `<interface type="ethernet"><alias name="ua-fast"/><address type="pci" domain="0x0000" bus="0x00" slot="0x18" function="0x1"/></interface>`
	)
	in := bytes.Replace(read(t, "kernel-boot"), []byte("<devices>"), []byte("<devices>"+tap+others), 1)
	out, err := Define(in, config)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(out, []byte(tap)) || !bytes.Contains(out, []byte(others)) || bytes.Count(out, []byte(added)) != 1 {
		t.Errorf("it became:\n%s", out)
	}
}

// TestNominalAddresses: no two interfaces are at one place, none at function 0,
// and none where a VF is by default.
func TestNominalAddresses(t *testing.T) {
	seen := map[string]bool{}
	for n := range maxVFs {
		slot, function := nominalAddress(n)
		at := fmt.Sprintf("%x.%x", slot, function)
		if seen[at] || function < 1 || function > 7 || slot < kubevirt.FirstSlot+kubevirt.MaxInterfaces || slot > 0x1f {
			t.Errorf("interface %d is at %s", n, at)
		}
		seen[at] = true
	}
	if maxVFs < kubevirt.MaxInterfaces {
		t.Errorf("at most %d VFs, a VM may have %d", maxVFs, kubevirt.MaxInterfaces)
	}
}

func FuzzDefine(f *testing.F) {
	for _, name := range []string{"kernel-boot", "rich", "hugepages", "hugepages-no-memfd", "root-complex"} {
		f.Add(read(f, name))
	}
	f.Add([]byte(`<domain type="kvm"><os><type arch="x86_64" machine="q35">hvm</type></os><devices></devices></domain>`))
	f.Add([]byte(`<domain type="kvm"><os><type arch="x86_64" machine="q35"/></os><devices><interface type="ethernet"><alias name="ua-fast"/></interface> <interface/></devices><memoryBacking/><x:commandline xmlns:x="http://libvirt.org/schemas/domain/qemu/1.0"/></domain><!-- -->`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		out, err := Define(doc, config)
		if err != nil {
			return
		}
		again, err := Define(out, config)
		if err != nil {
			t.Fatalf("what was made of %q is refused: %v", doc, err)
		}
		if !bytes.Equal(out, again) {
			t.Fatalf("%q becomes\n%q, and that\n%q", doc, out, again)
		}
		d := &libvirtxml.Domain{}
		if d.Unmarshal(string(doc)) != nil {
			return // what it says elsewhere is not for Define to judge
		}
		if err := d.Unmarshal(string(out)); err != nil {
			t.Fatal(err)
		}
		var device struct{ Addr string }
		args := d.QEMUCommandline.Args
		if err := json.Unmarshal([]byte(args[len(args)-1].Value), &device); err != nil || device.Addr != "0x11" {
			t.Fatalf("the last argument is %q", args[len(args)-1].Value)
		}
	})
}

// TestTargetWithoutArchitecture: what virt-launcher shows while it prepares a
// migration's target tells no architecture.
func TestTargetWithoutArchitecture(t *testing.T) {
	doc := bytes.Replace(read(t, "kernel-boot"), []byte(` arch="x86_64"`), nil, 1)
	if bytes.Contains(doc, []byte("arch=")) {
		t.Fatal("the domain tells its architecture")
	}
	if _, err := Define(doc, config); err != nil {
		t.Error(err)
	}
}
