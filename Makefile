# Run `make` to see what there is. Everything that is built outside the tree
# goes to the cache: $COMPSC_CACHE, else $XDG_CACHE_HOME/compsc, else
# ~/.cache/compsc; a second clone finds it there.

SHELL := /bin/bash
export COMPSC_CACHE := $(or $(COMPSC_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/compsc)

VERSION ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

# Of `make demo`: how many times the VM moves.
HOPS ?= 1
# More flags for `go test`, such as -run=TestName or -v.
TESTFLAGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/compsc, a static binary.
	$(GOBUILD) -o bin/compsc .

.PHONY: generate
generate: ## Write the generated files: deep copies, CRDs, roles, protobuf code.
	@hack/generate

.PHONY: lint
lint: ## Check the source: format, vet, staticcheck, shell scripts, import rules, generated files.
	@hack/lint

.PHONY: unit
unit: ## Run the tests that need nothing but Go.
	@hack/test unit $(TESTFLAGS)

.PHONY: race
race: ## Run the same tests with the race detector.
	@. hack/lib.sh && need_packages gcc libc6-dev
	@CGO_ENABLED=1 hack/test unit -race $(TESTFLAGS)

# Of `make twin`: how many seeds it runs, or the one seed that it runs.
SEEDS ?= 2000
SEED ?=

.PHONY: twin
twin: ## Compare random guests that move with their twins that stay; SEEDS=n for n of them, SEED=n for one.
	@go test -count=1 -timeout=60m -run='^TestTwin$$' $(TESTFLAGS) ./e2e/twin -seeds=$(SEEDS) $(if $(SEED),-seed=$(SEED) -v)

.PHONY: apiserver
apiserver: kube kubevirt-crds kubevirt-hooks ## Run the tests against a real kube-apiserver.
	@hack/test apiserver $(TESTFLAGS)

.PHONY: qemu
qemu: artifacts compsc-demo ## Run the tests that move virtual machines (as root).
	@COMPSC_BINARY="$${COMPSC_BINARY:-$(CURDIR)/bin/compsc-demo}" hack/test qemu $(TESTFLAGS)

.PHONY: e2e-libvirt
e2e-libvirt: artifacts compsc-demo ## Of those, run the tests that are about libvirt (as root).
	@COMPSC_BINARY="$${COMPSC_BINARY:-$(CURDIR)/bin/compsc-demo}" hack/test libvirt $(TESTFLAGS)

.PHONY: e2e-chart
e2e-chart: artifacts helm previous build ## Install, upgrade and uninstall the Helm chart on a real API server, with its rights in force (as root).
	@COMPSC_BINARY="$(CURDIR)/bin/compsc" hack/test chart $(TESTFLAGS)

.PHONY: e2e-drivers
e2e-drivers: qemu-tree guest ipxe kube kubevirt-crds ## Move guests with unmodified drivers that use all they can (as root).
	@hack/test drivers $(TESTFLAGS)

# Of `make fuzz`: how long each target runs, and those whose input comes over
# the vfio-user socket.
FUZZTIME ?= 10s
FUZZTIME_VFIOUSER ?= 60s

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME, those of the vfio-user server for FUZZTIME_VFIOUSER.
	@FUZZTIME=$(FUZZTIME) FUZZTIME_VFIOUSER=$(FUZZTIME_VFIOUSER) hack/fuzz

.PHONY: e2e-sriov
e2e-sriov: qemu-tree sriov-node build ## Run the tests with real kernel drivers of emulated SR-IOV cards (as root); FAULTS=all for all faults in all steps.
	@COMPSC_FAULTS=$(FAULTS) hack/test sriov $(TESTFLAGS)

.PHONY: e2e-iommufd
e2e-iommufd: qemu-tree sriov-node iommufd-node build ## Run the same tests on a kernel with iommufd, and those of iommufd (as root).
	@COMPSC_FAULTS=$(FAULTS) hack/test iommufd $(TESTFLAGS)

.PHONY: e2e-nested
e2e-nested: qemu-tree guest sriov-node svm-qemu build ## Move a guest under KVM inside such a VM, with its own igbvf, from card to card (as root; minutes).
	@hack/test nested $(TESTFLAGS)

.PHONY: e2e-nodes
e2e-nodes: artifacts sriov-node svm-qemu ## Move such a guest from one such VM to another, by a VFMigration (as root; minutes).
	@hack/test nodes $(TESTFLAGS)

# What make test fuzzes: what a guest or a peer can reach in the running product, and guests that move.
FUZZED = ./agent/vfiouser ./agent/gate ./agent/compsc ./agent/family/ixgbevf ./agent/family/igbvf ./e2e/twin

.PHONY: test
test: ## Run all tests: unit, fuzz, apiserver, e2e-chart, qemu, e2e-sriov.
	@$(MAKE) --no-print-directory unit
	@FUZZTIME=$(FUZZTIME) FUZZTIME_VFIOUSER=$(FUZZTIME_VFIOUSER) hack/fuzz $(FUZZED)
	@$(MAKE) --no-print-directory apiserver
	@$(MAKE) --no-print-directory e2e-chart
	@$(MAKE) --no-print-directory qemu
	@$(MAKE) --no-print-directory e2e-sriov

# Of `make bench`: flags of e2e/bench, such as -strict or -only=access.
BENCHFLAGS ?=

.PHONY: bench
bench: ## Measure what it costs: switchover, register accesses, packet rate; also in out/bench.json; BENCHFLAGS=-strict to fail when a target is missed.
	@hack/bench $(BENCHFLAGS)

.PHONY: artifacts
artifacts: qemu-tree guest kube kubevirt-crds ## Make what tests and the demo run: QEMU, guests, control plane, KubeVirt's CRDs.

.PHONY: qemu-tree
qemu-tree:
	@hack/qemu-tree

.PHONY: guest
guest:
	@hack/guest

.PHONY: sriov-node
sriov-node:
	@hack/sriov-node

.PHONY: svm-qemu
svm-qemu:
	@hack/svm-qemu

.PHONY: iommufd-node
iommufd-node:
	@hack/iommufd-node

.PHONY: ipxe
ipxe:
	@hack/ipxe

.PHONY: kube
kube:
	@hack/kube/build

.PHONY: helm
helm:
	@hack/helm/build

.PHONY: previous
previous:
	@hack/previous/build

.PHONY: kubevirt-crds
kubevirt-crds:
	@hack/kubevirt-crds/build

# Of `make kubevirt` and what needs it: the KubeVirt, 1.8 or 1.9.
KUBEVIRT ?= 1.8

.PHONY: kubevirt
kubevirt: guest kube ## Make what a Kubernetes with real nodes and KubeVirt consists of (half an hour if nothing is cached); KUBEVIRT=1.9 for that one.
	@hack/kubevirt/build $(KUBEVIRT)

# This project's images as the nodes of e2e/kubevirt have them.
.PHONY: kubevirt-product
kubevirt-product:
	$(GOBUILD) -o out/kubevirt/compsc .
	$(GOBUILD) -o out/kubevirt/deviceplugin ./e2e/deviceplugin
	@IMAGE=localhost/compsc:e2e ARCH=amd64 VERSION=$(VERSION) BINARY=out/kubevirt/compsc go run ./hack/image hack/image/compsc.yaml out/kubevirt/compsc.tar
	@DEVICEPLUGIN=out/kubevirt/deviceplugin ARCH=amd64 go run ./hack/image e2e/deviceplugin/image.yaml out/kubevirt/deviceplugin.tar

.PHONY: e2e-kubevirt
e2e-kubevirt: kubevirt kubevirt-product helm ## Move VMs on real Kubernetes and KubeVirt (as root; minutes, half an hour at first); ALL=1 for more, KUBEVIRT=1.9 for that one.
	@ALL=$(ALL) COMPSC_KUBEVIRT=$(KUBEVIRT) hack/test kubevirt $(TESTFLAGS)

.PHONY: demo-kubevirt
demo-kubevirt: kubevirt kubevirt-product helm ## The demo on real Kubernetes and KubeVirt (as root); KEEP=1 leaves it running.
	@COMPSC_KUBEVIRT=$(KUBEVIRT) go run ./e2e/kubevirt/demo $(if $(KEEP),-keep)

.PHONY: kubevirt-hooks
kubevirt-hooks:
	@hack/kubevirt-hooks/build

.PHONY: demo
demo: artifacts compsc-demo ## Move a running VM with its VF between two simulated nodes (as root); HOPS=n for n moves.
	@bin/compsc-demo demo --hops $(HOPS)

# The product with the demonstration and the faults that tests inject built in.
.PHONY: compsc-demo
compsc-demo:
	$(GOBUILD) -tags demo -o bin/compsc-demo .

.PHONY: image
image: ## Build the container image with docker.
	docker build --build-arg VERSION=$(VERSION) -t compsc:$(VERSION) .

# Of `make image-archive`: the image's name and its architecture.
IMAGE ?= localhost/compsc:$(VERSION)
ARCH ?= $(shell go env GOARCH)

.PHONY: image-archive
image-archive: ## Build the same image without docker: out/compsc-image.tar; ARCH=arm64 for another architecture.
	GOOS=linux GOARCH=$(ARCH) $(GOBUILD) -o out/image/$(ARCH)/compsc .
	@IMAGE=$(IMAGE) ARCH=$(ARCH) VERSION=$(VERSION) BINARY=out/image/$(ARCH)/compsc \
		go run ./hack/image hack/image/compsc.yaml out/compsc-image.tar

.PHONY: clean
clean: ## Remove what was built in the tree; the cache stays.
	rm -rf bin out
