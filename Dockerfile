# podshim, podmon, crictl and the CNI plugins in one image, for running podshim
# privileged on a host. docs/install.md has the command and what it does not give.
#
#   docker build -t podshim .

FROM golang:1.26-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libseccomp-dev make pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src

# Modules first: they change less often than the code.
COPY go.mod go.sum ./
COPY hack/tools/go.mod hack/tools/go.sum ./hack/tools/
RUN go mod download && cd hack/tools && go mod download

# Versions of crictl and the plugins are those of hack/tools, as in the tests.
COPY hack/tools ./hack/tools
RUN cd hack/tools \
 && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o /out/bin/ sigs.k8s.io/cri-tools/cmd/crictl \
 && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o /out/cni/ \
      $(sed -n 's|^\t_ "\(.*/plugins/.*\)"|\1|p' tools.go)

COPY . .
ARG VERSION=devel
RUN make build VERSION=${VERSION} && cp bin/podshim bin/podmon /out/bin/

FROM debian:bookworm-slim
# iptables: portmap and masquerading. ca-certificates: registries.
# kmod: overlay may be a module that is not loaded yet.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates iproute2 iptables kmod mount \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/bin/ /usr/local/bin/
# The second of podshim's plugin directories: the host's /opt/cni/bin, when it is
# mounted, comes first.
COPY --from=build /out/cni/ /usr/lib/cni/
# What crictl in this image talks to.
ENV CONTAINER_RUNTIME_ENDPOINT=unix:///run/podshim/podshim.sock
STOPSIGNAL SIGTERM
ENTRYPOINT ["podshim"]
