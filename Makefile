# podshim. `make help` says what there is.
#
# Every target installs what it needs and this machine lacks (Debian packages,
# by hack/need.sh; Go modules, by Go). Wanted beforehand: Go, and root.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BIN      := $(CURDIR)/bin
TOOLS    := $(CURDIR)/_artifacts/tools
PEERS    := $(CURDIR)/_artifacts/peers
IMAGES   := $(CURDIR)/_artifacts/images
VM       := $(CURDIR)/_artifacts/vm$(if $(LSM),-$(LSM))
PREFIX   ?= /usr/local
DESTDIR  ?=
# What is worth its time in an emulated machine: cgroups, and who is restarted by what.
VM_EXAMPLES ?= ^(TestPods|TestRestarts)$$/^(localhost|shared-pid|lifetimes|resources|classes|pod-resources|child-oom|pid-limit|huge-pages|probes|hooks|pid1|log-sidecar|volume|stats)$$
ARGS     ?=

LDFLAGS  := -s -w -X main.version=$(VERSION)
need     := hack/need.sh

# Packages by what they are needed for: PROBE=PACKAGE.
NEED_BUILD  := gcc=gcc pkg-config=pkg-config /usr/include/stdlib.h=libc6-dev /usr/include/seccomp.h=libseccomp-dev
NEED_IMAGES := gcc=gcc /usr/include/stdlib.h=libc6-dev debootstrap=debootstrap \
               /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
NEED_VM     := qemu-system-x86_64=qemu-system-x86 debootstrap=debootstrap mkfs.ext4=e2fsprogs \
               /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
NEED_TEST   := mkfs.ext4=e2fsprogs iptables=iptables nft=nftables ip=iproute2 busybox=busybox

##@ Build

# podmon is static: it starts itself again for every container, inside the
# container's mount namespace, and must not need a loader or libraries.
.PHONY: build
build: ## podshim and podmon, into bin/
	@$(need) $(NEED_BUILD)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/podshim ./cmd/podshim
	CGO_ENABLED=1 go build -trimpath -tags 'seccomp netgo osusergo' \
		-ldflags '$(LDFLAGS) -linkmode external -extldflags -static' -o $(BIN)/podmon ./cmd/podmon

.PHONY: install
install: build ## podshim and podmon, into $(DESTDIR)$(PREFIX)
	install -D -m 0755 $(BIN)/podshim $(DESTDIR)$(PREFIX)/bin/podshim
	install -D -m 0755 $(BIN)/podmon $(DESTDIR)$(PREFIX)/bin/podmon

.PHONY: clean
clean: ## Remove what was built (not the downloaded Debian packages)
	rm -rf $(BIN) $(TOOLS) $(PEERS) _artifacts/critest $(IMAGES)/layout-*

##@ Try

.PHONY: demo
demo: build tools images ## One pod on a private podshim, shown and taken down again
	@$(need) $(NEED_TEST)
	@go run ./hack/demo $(ARGS)

##@ Test

.PHONY: test
test: lint unit pod fault-short e2e-short critest ## All tests; what .ci/run calls

.PHONY: unit
unit: ## Tests of the packages, as root where they need it
	@$(need) $(NEED_BUILD) $(NEED_TEST)
	@$(MAKE) --no-print-directory tools images
	PODSHIM_TOOLS_DIR=$(TOOLS) go test -tags seccomp ./cmd/... ./internal/... ./test/images/... ./test/machine/...

.PHONY: pod
pod: build tools ## Pods on a real podshim, seen by the kernel
	@$(need) $(NEED_TEST)
	PODSHIM_BIN_DIR=$(BIN) PODSHIM_TOOLS_DIR=$(TOOLS) go test -count=1 -timeout 20m ./test/harness/... ./test/pod/... ./test/cricoverage/...

.PHONY: cri-coverage
cri-coverage: build tools ## Call every RPC of the CRI, set every field, and count (docs/cri.md)
	@$(need) $(NEED_TEST)
	@PODSHIM_BIN_DIR=$(BIN) PODSHIM_TOOLS_DIR=$(TOOLS) go test -count=1 -v ./test/cricoverage/... $(ARGS)

.PHONY: fault
fault: build tools ## Break things under a real podshim, at full length
	@$(need) $(NEED_TEST)
	PODSHIM_BIN_DIR=$(BIN) PODSHIM_TOOLS_DIR=$(TOOLS) go test -count=1 -timeout 120m ./test/fault/... $(ARGS)

.PHONY: fault-short
fault-short: ## The same, fewer times: what CI runs
	@$(MAKE) --no-print-directory fault ARGS='-short $(ARGS)'

.PHONY: critest
critest: build tools images ## cri-tools' conformance suite, and a search for leaks
	@$(need) $(NEED_TEST)
	go run ./test/critest $(ARGS)

.PHONY: critest-variants
critest-variants: build tools images ## The suite with an infra image, and with a handler by name
	@$(need) $(NEED_TEST)
	go run ./test/critest -websocket=false -infra-image registry.k8s.io/pause:3.9 $(ARGS)
	go run ./test/critest -websocket=false -runtime-handler other $(ARGS)

.PHONY: critest-vs-containerd
critest-vs-containerd: critest peers ## The same suite on containerd, to compare the time it takes
	go run ./test/critest -runtime containerd -websocket=false $(ARGS)

.PHONY: critest-bench
critest-bench: build tools images ## critest's benchmarks; JSON in _artifacts/critest/benchmark
	@$(need) $(NEED_TEST)
	go run ./test/critest -benchmark $(ARGS)

.PHONY: vm
vm: build tools ## test/pod in a Debian VM: cgroup v2, systemd, AppArmor (LSM=selinux: SELinux), which this machine lacks
	$(call run_in_vm,pod,! -name critest ! -name 'kube*')

.PHONY: vm-e2e
vm-e2e: build tools images kubelet ## kubelet with the examples of VM_EXAMPLES in that VM
	$(call run_in_vm,e2e,! -name critest ! -name kube-apiserver ! -name kubectl ! -name kubeadm,-test.run $(VM_EXAMPLES) -test.parallel 3)

# run_in_vm,SUITE,TOOLS,ARGS: test/SUITE in the VM, as guest.sh finds it; TOOLS tell find
# which of the tools it needs.
define run_in_vm
@$(need) $(NEED_VM)
@test/vm/disk.sh $(VM) $(LSM)
@payload=$$(mktemp -d) && trap 'rm -rf "$$payload"' EXIT && \
mkdir -p "$$payload/bin" "$$payload/tools" "$$payload/test/$1" "$$payload/_artifacts/images" && \
cp $(BIN)/podshim $(BIN)/podmon "$$payload/bin" && \
find $(TOOLS)/ -maxdepth 1 -type f $2 -exec cp {} "$$payload/tools" \; && \
CGO_ENABLED=0 go test -c -ldflags '-s -w' -o "$$payload/test/$1/suite" ./test/$1 && \
if [ $1 = e2e ]; then cp -r examples "$$payload" && cp -r $(IMAGES)/layout-* "$$payload/_artifacts/images"; fi && \
cp test/vm/guest.sh "$$payload" && \
printf "SUITE=%s DRIVERS='%s' ARGS='%s'\n" $1 '$(or $(DRIVERS),cgroupfs systemd)' '$3 $(ARGS)' >"$$payload/settings" && \
VM_APPEND='$(if $(LSM),security=$(LSM) selinux=1 enforcing=0)' test/vm/run.sh $(VM) "$$payload"
endef

.PHONY: bench
bench: build tools peers crio images ## podshim beside containerd and CRI-O: times, memory, CPU (a quarter to half an hour)
	@$(need) $(NEED_TEST) igzip=isal
	@go build -o $(BIN)/bench ./hack/bench && $(BIN)/bench $(ARGS)

.PHONY: lint
lint: ## gofmt and go vet
	@unformatted=$$(gofmt -l cmd internal test hack); \
	if [ -n "$$unformatted" ]; then echo "gofmt -w these:"; echo "$$unformatted"; exit 1; fi
	@$(need) $(NEED_BUILD)
	go vet -tags seccomp ./...

##@ Programs that tests drive podshim with

.PHONY: tools
tools: ## crictl, critest and the CNI plugins, at the versions of hack/tools
	@mkdir -p $(TOOLS)
	@cd hack/tools && version=$$(go list -m -f '{{.Version}}' sigs.k8s.io/cri-tools) && \
	flags="-X sigs.k8s.io/cri-tools/pkg/version.Version=$${version#v}" && \
	CGO_ENABLED=0 go build -ldflags "$$flags" -o $(TOOLS)/ sigs.k8s.io/cri-tools/cmd/crictl && \
	CGO_ENABLED=0 go test -c -ldflags "$$flags" -o $(TOOLS)/critest sigs.k8s.io/cri-tools/cmd/critest && \
	CGO_ENABLED=0 go build -o $(TOOLS)/ $$(sed -n 's|^\t_ "\(.*/plugins/.*\)"|\1|p' tools.go)

.PHONY: peers
peers: ## containerd and runc, for comparisons (takes minutes)
	@$(need) $(NEED_BUILD)
	GOBIN=$(PEERS) go install -tags 'no_btrfs no_devmapper no_zfs' github.com/containerd/containerd/v2/cmd/containerd@v2.4.2
	GOBIN=$(PEERS) go install -tags 'no_btrfs no_devmapper no_zfs' github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@v2.4.2
	GOBIN=$(PEERS) go install -tags seccomp github.com/opencontainers/runc@v1.5.2

.PHONY: crio
crio: ## CRI-O at the version of hack/crio, with Debian's conmon (takes minutes)
	@$(need) $(NEED_BUILD) conmon=conmon /usr/include/gpgme.h=libgpgme-dev /usr/include/assuan.h=libassuan-dev
	@mkdir -p $(PEERS)
	cd hack/crio && go build -tags 'containers_image_openpgp exclude_graphdriver_btrfs seccomp' -o $(PEERS)/ github.com/cri-o/cri-o/cmd/crio
	cd hack/crio && gcc -std=c99 -Os -static -o $(PEERS)/pinns "$$(go list -m -f '{{.Dir}}' github.com/cri-o/cri-o)"/pinns/src/*.c

.PHONY: images
images: ## Test images from Debian's packages, into _artifacts/images
	@$(need) $(NEED_IMAGES)
	@go run ./test/images/testimages build -dir $(IMAGES) >/dev/null

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ A real kubelet

.PHONY: kubelet
kubelet: ## kubelet, at the version of hack/kubelet (takes minutes, once)
	@mkdir -p $(TOOLS)
	@cd hack/kubelet && version=$$(go list -m -f '{{.Version}}' k8s.io/kubernetes) && \
	CGO_ENABLED=0 go build -ldflags "-X k8s.io/component-base/version.gitVersion=$$version" \
		-o $(TOOLS)/ k8s.io/kubernetes/cmd/kubelet

.PHONY: kube
kube: ## kubelet, kube-apiserver, kubectl and kubeadm, at the version of hack/kubelet (takes minutes, once)
	@mkdir -p $(TOOLS)
	@cd hack/kubelet && version=$$(go list -m -f '{{.Version}}' k8s.io/kubernetes) && \
	CGO_ENABLED=0 go build -ldflags "-X k8s.io/component-base/version.gitVersion=$$version" \
		-o $(TOOLS)/ k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubectl \
		k8s.io/kubernetes/cmd/kubeadm

.PHONY: e2e
e2e: build tools images kubelet ## The pods of examples/pods, run by a real kubelet (those of examples/cluster: e2e-cluster)
	@$(need) $(NEED_TEST)
	PODSHIM_BIN_DIR=$(BIN) PODSHIM_TOOLS_DIR=$(TOOLS) go test -count=1 -timeout 30m -skip '^TestCluster' ./test/e2e/... $(ARGS)

.PHONY: e2e-short
e2e-short: ## The same with fewer pods at once and fewer probes: what CI runs
	@$(MAKE) --no-print-directory e2e ARGS='-short $(ARGS)'

.PHONY: e2e-cluster
e2e-cluster: build tools images kube ## The pods of examples/cluster: kubelet with an API server, which is a pod on podshim
	@$(need) $(NEED_TEST)
	PODSHIM_BIN_DIR=$(BIN) PODSHIM_TOOLS_DIR=$(TOOLS) go test -count=1 -timeout 30m -run '^TestCluster' ./test/e2e/... $(ARGS)
