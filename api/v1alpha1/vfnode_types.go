package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Condition types of a VFNode, written by its agent.
const (
	// ConditionReady is True while the agent can serve migrations. An agent
	// that died cannot say so: its lease tells.
	ConditionReady = "Ready"
	// ConditionKubeVirt is True while KubeVirt is installed and knows the
	// compsc network binding, as VMs with VFs need it.
	ConditionKubeVirt = "KubeVirt"
	// ConditionNodeHooks is True while KubeVirt calls the agent at the points
	// of a migration. Where it is False, the message tells what guards
	// migrations instead.
	ConditionNodeHooks = "NodeHooks"
	// ConditionQEMU is True while the QEMU last seen in a virt-launcher of
	// the node can attach VFs, False while it cannot, Unknown as long as none
	// was seen.
	ConditionQEMU = "QEMU"
	// ConditionIntact is True while the VFs in use are as the agent prepared
	// them, False with reason Reconfigured once somebody changed them or their
	// PF, and Unknown while that cannot be found out: those VMs cannot be moved
	// until their pods are restarted.
	ConditionIntact = "Intact"
)

// Reasons of these conditions that are not of package
// agent/kubevirt/cluster, which has those of ConditionKubeVirt and
// ConditionNodeHooks.
const (
	// ReasonNotServed: the agent was told not to serve KubeVirt's node hooks.
	ReasonNotServed = "NotServed"
	// ReasonUnreadable: the API server did not answer.
	ReasonUnreadable = "Unreadable"
	// ReasonNotSeen: no virt-launcher could be looked into yet.
	ReasonNotSeen = "NotSeen"
	// ReasonVFIOUserPresent and ReasonVFIOUserMissing: QEMU has, or lacks, its
	// device vfio-user-pci (QEMU 10.1 and newer can be built with it).
	ReasonVFIOUserPresent = "VFIOUserPresent"
	ReasonVFIOUserMissing = "VFIOUserMissing"
	// ReasonReconfigured: VFs in use were removed or changed.
	ReasonReconfigured = "Reconfigured"
	// ReasonInventoryFailed: the node's NICs could not be read.
	ReasonInventoryFailed = "InventoryFailed"
	// ReasonDraining: the agent ends when the migrations of its node have; the
	// next agent serves new ones.
	ReasonDraining = "Draining"
	// ReasonCertificateUnavailable: the agent has no valid certificate to prove
	// its node with. It is also the reason of an event when no new one could be got.
	ReasonCertificateUnavailable = "CertificateUnavailable"
)

// Reasons of events of a VFNode: the node's agent refused a connection with
// another agent.
const (
	// EventPeerCertificateMissing: the other side showed no certificate.
	EventPeerCertificateMissing = "PeerCertificateMissing"
	// EventPeerCertificateExpired: its certificate is not valid at this time.
	EventPeerCertificateExpired = "PeerCertificateExpired"
	// EventPeerCertificateUntrusted: its certificate is from an authority that
	// agents do not trust.
	EventPeerCertificateUntrusted = "PeerCertificateUntrusted"
	// EventPeerRefused: it did not prove its node for another reason, which the
	// event tells.
	EventPeerRefused = "PeerRefused"
)

// VFNodeSpec is empty: a VFNode only reports.
type VFNodeSpec struct{}

// VFNodeStatus is what the node's agent found on it.
type VFNodeStatus struct {
	// Conditions are documented at the constants of their types.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// PeerAddress is where the agent listens for other agents, host:port.
	// +optional
	// +kubebuilder:validation:MaxLength=300
	PeerAddress string `json:"peerAddress,omitempty"`

	// AgentVersion is the agent's build version.
	// +optional
	AgentVersion string `json:"agentVersion,omitempty"`

	// Protocols are the versions that the agent speaks of what the parts of
	// CompSC say to each other.
	// +optional
	Protocols *ProtocolRange `json:"protocols,omitempty"`

	// PFs are the physical functions that have VFs.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	PFs []PFStatus `json:"pfs,omitempty"`
}

// ProtocolRange is from the oldest to the newest version that is spoken.
type ProtocolRange struct {
	// +kubebuilder:validation:Minimum=1
	Oldest int32 `json:"oldest"`
	// +kubebuilder:validation:Minimum=1
	Newest int32 `json:"newest"`
}

// PFStatus is one physical function.
type PFStatus struct {
	// Name is the network interface's name.
	Name string `json:"name"`
	// Backend is "model" or "vfio".
	Backend string `json:"backend"`
	// Address is the PCI address; empty for a model.
	// +optional
	Address string `json:"address,omitempty"`
	// Driver that is bound to it, with its version, and the version of its
	// firmware, as ethtool -i shows them; empty where not known.
	// +optional
	Driver string `json:"driver,omitempty"`
	// +optional
	DriverVersion string `json:"driverVersion,omitempty"`
	// +optional
	FirmwareVersion string `json:"firmwareVersion,omitempty"`
	// VFs are its virtual functions.
	// +optional
	// +listType=map
	// +listMapKey=address
	// +kubebuilder:validation:MaxItems=256
	VFs []VFStatus `json:"vfs,omitempty"`
}

// VFStatus is one virtual function.
type VFStatus struct {
	// Address is the PCI address.
	Address string `json:"address"`
	// DeviceID is vendor:device in hexadecimal, such as 8086:10ed.
	DeviceID string `json:"deviceID"`
	// Family names the register family, such as ixgbevf.
	// +optional
	Family string `json:"family,omitempty"`
	// Obstacle says why the VF cannot be used at all, and what to do; empty
	// if it can.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Obstacle string `json:"obstacle,omitempty"`
	// Damage says what happened to the VF behind the agent's back since it was
	// prepared, and what to do; empty if nothing did. A VM that has it cannot be
	// moved.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Damage string `json:"damage,omitempty"`
	// Holder is the pod that the VF is leased to, namespace/name; empty when free.
	// +optional
	Holder string `json:"holder,omitempty"`
	// Epoch is the fencing epoch of the VF's lease.
	// +optional
	Epoch int64 `json:"epoch,omitempty"`
	// FastPath tells that the guest of its holder reaches the VF's doorbells by
	// itself, as the VMI's annotation compsc.io/fast-path asks.
	// +optional
	FastPath bool `json:"fastPath,omitempty"`
	// Immovable says why its holder's VM cannot be moved with the VF, whatever
	// the target, and what to do; empty if it can.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Immovable string `json:"immovable,omitempty"`
}

// VFNode is a node's inventory of VFs, written by its agent alone. Its name
// is the node's.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=vfn,categories=compsc
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="PFs",type=string,JSONPath=`.status.pfs[*].name`
// +kubebuilder:printcolumn:name="Peer",type=string,JSONPath=`.status.peerAddress`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.agentVersion`,priority=10
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VFNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec   VFNodeSpec   `json:"spec,omitempty"`
	Status VFNodeStatus `json:"status,omitempty"`
}

// VFNodeList is a list of VFNodes.
// +kubebuilder:object:root=true
type VFNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []VFNode `json:"items"`
}
