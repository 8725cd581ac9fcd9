package family

import "testing"

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		Skip.String(): "skip", Derive.String(): "derive", Class(9).String(): "class 9",
		RW.String(): "read, write", Access(0).String(): "",
		(Readable | ReadClears | WriteOneClears).String(): "read, read clears, write 1 clears",
		WriteOneSets.String():                             "write 1 sets", RX.String(): "rx", TX.String(): "tx",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
