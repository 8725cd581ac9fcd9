// A stand-in for libguestfs.org/libnbd: see libnbd.go.
module libguestfs.org/libnbd

go 1.24.0
