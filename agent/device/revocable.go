package device

import (
	"errors"
	"os"
	"sync"
)

// errGivenUp is returned for what cannot be asked of a VF that was given up.
var errGivenUp = errors.New("the VF was given back to the kernel")

// revocable is a VF of the kernel's that can be closed under its users' hands:
// from then on it reads all ones, and what is asked of it is done, for there
// is nothing left to do.
type revocable struct {
	mu sync.RWMutex
	vf kernelVF // nil: closed
}

// with calls do unless the VF is closed.
func (r *revocable) with(do func(kernelVF)) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.vf == nil {
		return false
	}
	do(r.vf)
	return true
}

// try is with for what may fail.
func (r *revocable) try(do func(kernelVF) error) (err error) {
	r.with(func(k kernelVF) { err = do(k) })
	return err
}

func (r *revocable) Read(off uint32) uint32 {
	value := ^uint32(0)
	r.with(func(k kernelVF) { value = k.Read(off) })
	return value
}

func (r *revocable) Write(off, v uint32) { r.with(func(k kernelVF) { k.Write(off, v) }) }

func (r *revocable) BARSize() (n uint32) {
	r.with(func(k kernelVF) { n = k.BARSize() })
	return n
}

func (r *revocable) BARFile() (f *os.File, offset int64) {
	r.with(func(k kernelVF) { f, offset = k.BARFile() })
	return f, offset
}

func (r *revocable) Vectors() (n int) {
	r.with(func(k kernelVF) { n = k.Vectors() })
	return n
}

func (r *revocable) ReadConfig(off int64, p []byte) error {
	err := errGivenUp
	r.with(func(k kernelVF) { err = k.ReadConfig(off, p) })
	return err
}

func (r *revocable) Map(iova uint64, mem []byte, readable, writable bool) error {
	return r.try(func(k kernelVF) error { return k.Map(iova, mem, readable, writable) })
}

func (r *revocable) Unmap(iova, size uint64) error {
	return r.try(func(k kernelVF) error { return k.Unmap(iova, size) })
}

func (r *revocable) Connect(vector, eventfd int) error {
	return r.try(func(k kernelVF) error { return k.Connect(vector, eventfd) })
}

func (r *revocable) ConnectRequest(eventfd int) error {
	return r.try(func(k kernelVF) error { return k.ConnectRequest(eventfd) })
}

func (r *revocable) DisconnectAll() error { return r.try(kernelVF.DisconnectAll) }

func (r *revocable) Reset() error { return r.try(kernelVF.Reset) }

func (r *revocable) HasDirtyBits() (has bool) {
	r.with(func(k kernelVF) { has = k.HasDirtyBits() })
	return has
}

func (r *revocable) TrackDirty(on bool) error {
	return r.try(func(k kernelVF) error { return k.TrackDirty(on) })
}

func (r *revocable) Dirty(iova, size uint64, page func(iova uint64)) error {
	return r.try(func(k kernelVF) error { return k.Dirty(iova, size, page) })
}

// Close waits for those who use the VF at the moment. Repeating it does
// nothing.
func (r *revocable) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.vf == nil {
		return nil
	}
	err := r.vf.Close()
	r.vf = nil
	return err
}
