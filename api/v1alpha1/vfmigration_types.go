package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Condition types of a VFMigration. Each has exactly one writer.
const (
	// ConditionAccepted is True once everything that can be known beforehand
	// allows the migration. Written by the manager.
	ConditionAccepted = "Accepted"
	// ConditionTargetPinned is True while the VFs that the target pod was
	// given are leased to it and attached to its device process, silent.
	// Written by the target's agent.
	ConditionTargetPinned = "TargetPinned"
	// ConditionPrepared is True once the target has judged the source's VFs
	// movable and both gates are armed. Written by the source's agent.
	ConditionPrepared = "Prepared"
	// ConditionCaptured is True once the VM is stopped and the target holds
	// its VFs' state. Written by the source's agent.
	ConditionCaptured = "Captured"
	// ConditionRestored is True once the target's VFs carry the state and the
	// VM may start there. Written by the target's agent.
	ConditionRestored = "Restored"
	// ConditionVerified is True once the VM runs on the target and its driver
	// was seen using every VF. Written by the target's agent.
	ConditionVerified = "Verified"
	// ConditionRolledBack is True once a failed or aborted migration has left
	// the VM on the source with its VFs working, False when that was no
	// longer possible. Written by the source's agent.
	ConditionRolledBack = "RolledBack"
	// ConditionSucceeded is the summary: Unknown while the migration is under
	// way, then True or False for good. Written by the manager.
	ConditionSucceeded = "Succeeded"
)

// Reasons of conditions, and of status.failure. A condition that is True
// for the plain reason has its own type as reason.
const (
	// ReasonProgressing: nothing is wrong, the step is not done yet.
	ReasonProgressing = "Progressing"
	// ReasonRollingBack: the migration failed or was aborted and is being undone.
	ReasonRollingBack = "RollingBack"
	// ReasonVMINotFound: spec.vmiName names no VMI in the namespace.
	ReasonVMINotFound = "VMINotFound"
	// ReasonVMINotRunning: the VMI is not in phase Running.
	ReasonVMINotRunning = "VMINotRunning"
	// ReasonInterfaceNotFound: the VMI has no interface of that name with the
	// compsc network binding, or none at all.
	ReasonInterfaceNotFound = "InterfaceNotFound"
	// ReasonPostCopyAllowed: KubeVirt may finish the migration by post-copy,
	// which leaves RAM behind that the VF's DMA needs.
	ReasonPostCopyAllowed = "PostCopyAllowed"
	// ReasonDecentralized: the migration leaves the cluster or namespace, where
	// no agent of this cluster can follow.
	ReasonDecentralized = "Decentralized"
	// ReasonMigrationInProgress: another VFMigration, or a
	// VirtualMachineInstanceMigration of somebody else, moves the same VMI.
	ReasonMigrationInProgress = "MigrationInProgress"
	// ReasonTargetNotFound: no node matches spec.target, or it is the source.
	ReasonTargetNotFound = "TargetNotFound"
	// ReasonAgentUnavailable: the agent of the source or target node does not
	// renew its lease.
	ReasonAgentUnavailable = "AgentUnavailable"
	// ReasonNoFreeVF: no node that could be the target has enough free VFs of
	// the same kind.
	ReasonNoFreeVF = "NoFreeVF"
	// ReasonVersionMismatch: manager, agents and device processes that the
	// migration needs are of versions that do not understand each other.
	ReasonVersionMismatch = "VersionMismatch"
	// ReasonIncompatible: the target's VF cannot carry the source's state.
	ReasonIncompatible = "Incompatible"
	// ReasonImmovable: a VF of the VM cannot be moved from where it is, whatever
	// the target: it has the fast path, and its node's IOMMU does not record what
	// it writes.
	ReasonImmovable = "Immovable"
	// ReasonPinFailed: the target's VF could not be leased or attached.
	ReasonPinFailed = "PinFailed"
	// ReasonPeerUnavailable: the agents could not reach each other.
	ReasonPeerUnavailable = "PeerUnavailable"
	// ReasonDeviceUnavailable: a device process does not answer.
	ReasonDeviceUnavailable = "DeviceUnavailable"
	// ReasonCaptureFailed: the source's VF could not be stopped or read.
	ReasonCaptureFailed = "CaptureFailed"
	// ReasonStateRejected: the target refused the captured state.
	ReasonStateRejected = "StateRejected"
	// ReasonRestoreFailed: the target's VF did not take the state.
	ReasonRestoreFailed = "RestoreFailed"
	// ReasonMigrationFailed: KubeVirt reported the migration failed.
	ReasonMigrationFailed = "MigrationFailed"
	// ReasonTimeout: a bound of spec.timeouts passed.
	ReasonTimeout = "Timeout"
	// ReasonAborted: spec.abort was set, or the
	// VirtualMachineInstanceMigration of spec.migrationRef was deleted.
	ReasonAborted = "Aborted"
	// ReasonDeleted: the VFMigration was deleted while under way.
	ReasonDeleted = "Deleted"
	// ReasonReleased: the target's VFs were given back.
	ReasonReleased = "Released"
	// ReasonPointOfNoReturn: too late to undo, the target owns the VFs.
	ReasonPointOfNoReturn = "PastPointOfNoReturn"
)

// VFMigrationPhase is a printed summary of the conditions; nothing derives
// anything from it.
// +kubebuilder:validation:Enum=Pending;Pinning;Preparing;Copying;Switching;Verifying;RollingBack;Succeeded;Failed
type VFMigrationPhase string

// Phases, in order of progress.
const (
	PhasePending     VFMigrationPhase = "Pending"
	PhasePinning     VFMigrationPhase = "Pinning"
	PhasePreparing   VFMigrationPhase = "Preparing"
	PhaseCopying     VFMigrationPhase = "Copying"
	PhaseSwitching   VFMigrationPhase = "Switching"
	PhaseVerifying   VFMigrationPhase = "Verifying"
	PhaseRollingBack VFMigrationPhase = "RollingBack"
	PhaseSucceeded   VFMigrationPhase = "Succeeded"
	PhaseFailed      VFMigrationPhase = "Failed"
)

// VFMigrationFinalizer keeps a VFMigration until what it started is undone
// or done.
const VFMigrationFinalizer = "compsc.io/vfmigration"

// VFMigrationSpec says which VM moves, and where to.
// +kubebuilder:validation:XValidation:rule="self.vmiName == oldSelf.vmiName",message="vmiName is immutable"
// +kubebuilder:validation:XValidation:rule="has(self.interfaces) == has(oldSelf.interfaces) && (!has(self.interfaces) || self.interfaces == oldSelf.interfaces)",message="interfaces is immutable"
// +kubebuilder:validation:XValidation:rule="has(self.target) == has(oldSelf.target) && (!has(self.target) || self.target == oldSelf.target)",message="target is immutable"
// +kubebuilder:validation:XValidation:rule="has(self.migrationRef) == has(oldSelf.migrationRef) && (!has(self.migrationRef) || self.migrationRef == oldSelf.migrationRef)",message="migrationRef is immutable"
// +kubebuilder:validation:XValidation:rule="!(has(oldSelf.abort) && oldSelf.abort) || (has(self.abort) && self.abort)",message="abort cannot be taken back"
type VFMigrationSpec struct {
	// VMIName is the VirtualMachineInstance to move, in the same namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	VMIName string `json:"vmiName"`

	// Interfaces names the VMI's interfaces that must be moved with their VF.
	// Empty means every interface with the compsc network binding. All of
	// the VM's VFs always move together; naming one that does not exist
	// refuses the migration.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:MinLength=1
	Interfaces []string `json:"interfaces,omitempty"`

	// Target restricts where the VM may go. Without it any node with enough
	// free VFs will do.
	// +optional
	Target *VFMigrationTarget `json:"target,omitempty"`

	// MigrationRef names a VirtualMachineInstanceMigration that somebody else
	// created (virtctl, an eviction, a drain): the VFMigration goes with that
	// one, and starts none of its own. The manager creates such a VFMigration
	// for every VirtualMachineInstanceMigration of a VM with VFs. Deleting
	// either object before the point of no return undoes the migration.
	// +optional
	MigrationRef *MigrationReference `json:"migrationRef,omitempty"`

	// Timeouts bound the migration's steps.
	// +optional
	// +kubebuilder:default={}
	Timeouts VFMigrationTimeouts `json:"timeouts,omitempty"`

	// Abort asks for the migration to be undone. Honoured up to the point of
	// no return; it cannot be taken back.
	// +optional
	Abort bool `json:"abort,omitempty"`
}

// VFMigrationTarget restricts the target node.
// +kubebuilder:validation:XValidation:rule="has(self.nodeName) != has(self.nodeSelector)",message="exactly one of nodeName and nodeSelector must be set"
type VFMigrationTarget struct {
	// NodeName is the one node to move to.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	NodeName string `json:"nodeName,omitempty"`

	// NodeSelector holds labels that the target node must carry.
	// +optional
	// +kubebuilder:validation:MinProperties=1
	// +kubebuilder:validation:MaxProperties=16
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
}

// VFMigrationTimeouts bound the steps of a migration.
type VFMigrationTimeouts struct {
	// Prepare bounds everything before pre-copy: target pod, pinning, verdict.
	// +optional
	// +kubebuilder:default="3m"
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('5s') && duration(self) <= duration('1h')",message="must be between 5s and 1h"
	Prepare *metav1.Duration `json:"prepare,omitempty"`
	// Migrate bounds pre-copy and switchover, from the end of Prepare.
	// +optional
	// +kubebuilder:default="15m"
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('5s') && duration(self) <= duration('24h')",message="must be between 5s and 24h"
	Migrate *metav1.Duration `json:"migrate,omitempty"`
	// Hold bounds each hold of QEMU's main loop in a switchover gate.
	// +optional
	// +kubebuilder:default="5s"
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('500ms') && duration(self) <= duration('10s')",message="must be between 500ms and 10s"
	Hold *metav1.Duration `json:"hold,omitempty"`
}

// VFMigrationStatus is what was observed of a migration.
type VFMigrationStatus struct {
	// ObservedGeneration is the generation of spec this status reflects.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Phase is a printed summary of the conditions.
	// +optional
	Phase VFMigrationPhase `json:"phase,omitempty"`

	// Conditions are documented at the constants of their types.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Source is where the VM ran when the migration was accepted.
	// +optional
	Source *VFMigrationEndpoint `json:"source,omitempty"`

	// Target is where the VM goes; set once KubeVirt has a target pod on a node.
	// +optional
	Target *VFMigrationEndpoint `json:"target,omitempty"`

	// MigrationRef is the VirtualMachineInstanceMigration that moves the VM.
	// +optional
	MigrationRef *MigrationReference `json:"migrationRef,omitempty"`

	// Failure is why the migration is being, or was, undone. Once set it stays.
	// +optional
	Failure *VFMigrationFailure `json:"failure,omitempty"`

	// Devices holds one entry for each VF that moves.
	// +optional
	// +listType=map
	// +listMapKey=interface
	// +kubebuilder:validation:MaxItems=8
	Devices []DeviceStatus `json:"devices,omitempty"`

	// Steps are the timed steps of the switchover, in the order they happened.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=32
	Steps []StepStatus `json:"steps,omitempty"`

	// Downtime is how long the VM and its VFs stood still.
	// +optional
	Downtime *Downtime `json:"downtime,omitempty"`

	// StartTime is when the migration was accepted.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`

	// CompletionTime is when Succeeded became True or False.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
}

// VFMigrationEndpoint is one side of a migration.
type VFMigrationEndpoint struct {
	// NodeName is the node.
	NodeName string `json:"nodeName"`
	// PodName is the virt-launcher pod on it.
	// +optional
	PodName string `json:"podName,omitempty"`
	// PodUID is that pod's UID.
	// +optional
	PodUID types.UID `json:"podUID,omitempty"`
}

// MigrationReference names a VirtualMachineInstanceMigration of the namespace.
type MigrationReference struct {
	// Name of the object.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// UID of the object.
	UID types.UID `json:"uid"`
}

// VFMigrationFailure says why a migration is undone.
type VFMigrationFailure struct {
	// Reason is one of the documented reasons.
	// +kubebuilder:validation:MaxLength=63
	Reason string `json:"reason"`
	// Message says what was wrong and what to do.
	// +kubebuilder:validation:MaxLength=4096
	Message string `json:"message"`
	// Time is when it was recorded; the undoing is bounded from here.
	Time metav1.Time `json:"time"`
}

// DeviceStatus is one VF on its way.
type DeviceStatus struct {
	// Interface is the VMI interface's name.
	// +kubebuilder:validation:MaxLength=63
	Interface string `json:"interface"`
	// Source is the VF that the guest leaves.
	// +optional
	Source *VFReference `json:"source,omitempty"`
	// Target is the VF that the guest gets.
	// +optional
	Target *VFReference `json:"target,omitempty"`
	// StateBytes is the size of the state that was sent.
	// +optional
	StateBytes int64 `json:"stateBytes,omitempty"`
	// PagesMarked counts the guest pages that the device had written and
	// that were marked for QEMU to send again.
	// +optional
	PagesMarked int64 `json:"pagesMarked,omitempty"`
	// ReplayedOperations counts the mailbox operations replayed into the
	// target's PF.
	// +optional
	ReplayedOperations int32 `json:"replayedOperations,omitempty"`
	// HeadsStrategy tells how the ring heads were restored.
	// +optional
	HeadsStrategy string `json:"headsStrategy,omitempty"`
	// FastPath tells that the guest reaches the VF's doorbells by itself, on both
	// sides, as the VMI's annotation compsc.io/fast-path asks.
	// +optional
	FastPath bool `json:"fastPath,omitempty"`
}

// VFReference names a VF on its node.
type VFReference struct {
	// PF is the physical function's interface name.
	// +optional
	PF string `json:"pf,omitempty"`
	// VF is the PCI address.
	VF string `json:"vf"`
	// MAC is the address the VF answers to.
	// +optional
	MAC string `json:"mac,omitempty"`
	// VLAN is the port VLAN, 0 for none.
	// +optional
	VLAN int32 `json:"vlan,omitempty"`
	// Epoch is the fencing epoch of the VF's lease.
	// +optional
	Epoch int64 `json:"epoch,omitempty"`
}

// StepStatus is one timed step.
type StepStatus struct {
	// Name of the step, prefixed with source/ or target/.
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// Took is how long it took.
	Took metav1.Duration `json:"took"`
}

// Downtime is how long things stood still. No clock is compared across
// nodes; the one-way latency of the state's delivery is not included.
type Downtime struct {
	// VMStopped lasts from the VM's stop on the source to its start on the target.
	VMStopped metav1.Duration `json:"vmStopped"`
	// DeviceStopped lasts from the VF's stop to the VF's start.
	DeviceStopped metav1.Duration `json:"deviceStopped"`
	// LinkGap lasts from the VF's stop on the source until each VF has passed a
	// frame on the target. It is absent if one passed none in the VM's first
	// second there.
	// +optional
	LinkGap *metav1.Duration `json:"linkGap,omitempty"`
}

// VFMigration moves a running VM to another node with its pass-through VFs
// in place: none is unplugged, reset or replaced for the guest.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=vfm,categories=compsc
// +kubebuilder:printcolumn:name="VMI",type=string,JSONPath=`.spec.vmiName`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Source",type=string,JSONPath=`.status.source.nodeName`
// +kubebuilder:printcolumn:name="Target",type=string,JSONPath=`.status.target.nodeName`
// +kubebuilder:printcolumn:name="Succeeded",type=string,JSONPath=`.status.conditions[?(@.type=="Succeeded")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Succeeded")].reason`
// +kubebuilder:printcolumn:name="VM stopped",type=string,JSONPath=`.status.downtime.vmStopped`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Device stopped",type=string,JSONPath=`.status.downtime.deviceStopped`,priority=10
// +kubebuilder:printcolumn:name="MAC",type=string,JSONPath=`.status.devices[*].target.mac`,priority=10
// +kubebuilder:printcolumn:name="Source VF",type=string,JSONPath=`.status.devices[*].source.vf`,priority=10
// +kubebuilder:printcolumn:name="Target VF",type=string,JSONPath=`.status.devices[*].target.vf`,priority=10
// +kubebuilder:printcolumn:name="Migration",type=string,JSONPath=`.status.migrationRef.name`,priority=10
type VFMigration struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   VFMigrationSpec   `json:"spec"`
	Status VFMigrationStatus `json:"status,omitempty"`
}

// VFMigrationList is a list of VFMigrations.
// +kubebuilder:object:root=true
type VFMigrationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []VFMigration `json:"items"`
}
