# syntax=docker/dockerfile:1
# One image for all processes of CompSC; the subcommand is the argument. The
# manager runs as the image's user, a device process as KubeVirt's; the agent
# needs root, which its pod asks for.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=devel
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
COPY --from=build /compsc /compsc
USER 65532:65532
ENTRYPOINT ["/compsc"]
