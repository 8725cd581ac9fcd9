package twin

import (
	"math/rand/v2"
	"testing"
)

// longestProgram is what a fuzzed guest's program has at most, in bytes: some
// dozens of operations.
const longestProgram = 4 << 10

// FuzzGuest has a guest whose program is the input moved.
func FuzzGuest(f *testing.F) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 0))
		program := make([]byte, longestProgram>>seed)
		for i := range program {
			program[i] = byte(r.Uint32())
		}
		f.Add(program)
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) == 0 {
			return // the seed 0
		}
		program = program[:min(len(program), longestProgram)]
		if _, err := Run(t.Context(), Options{Program: program, Operations: 40}); err != nil {
			show(t, err)
		}
	})
}
