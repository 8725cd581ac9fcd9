# One image for all processes of CompSC; the subcommand is the argument. The
# manager runs as the image's user, a device process as KubeVirt's; the agent
# needs root, which its pod asks for. BuildKit is needed, for the caches.
#
# The program depends on the sources and on the version of Go alone, so the
# builder's exact version is named; --build-arg GO_IMAGE=golang@sha256:... pins
# its bytes too.
ARG GO_IMAGE=golang:1.26.8
FROM --platform=$BUILDPLATFORM $GO_IMAGE AS build
# What is in the image beside the program. hack/image/compsc.yaml says the same.
RUN mkdir -p /rootfs/etc && \
    mkdir -m 1777 /rootfs/tmp && \
    printf '%s\n' root:x:0:0:root:/:/sbin/nologin nonroot:x:65532:65532:nonroot:/:/sbin/nologin >/rootfs/etc/passwd && \
    printf '%s\n' root:x:0: nonroot:x:65532: >/rootfs/etc/group && \
    printf '%s\n' 'hosts: files dns' >/rootfs/etc/nsswitch.conf
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=devel
ENV GOTOOLCHAIN=local
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY *.go ./
COPY api api
COPY agent agent
COPY controllers controllers
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /compsc .

FROM scratch
ARG VERSION=devel
COPY --from=build /rootfs/ /
COPY --from=build /compsc /compsc
ENV PATH=/
LABEL org.opencontainers.image.title=CompSC
LABEL org.opencontainers.image.version=$VERSION
LABEL org.opencontainers.image.licenses=Apache-2.0
USER 65532:65532
ENTRYPOINT ["/compsc"]
