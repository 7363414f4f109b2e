package spec

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the goldens anew")

func TestContainerGoldens(t *testing.T) {
	for _, tc := range containerCorpus {
		t.Run(tc.name, func(t *testing.T) {
			spec, _ := tc.built(t)
			compare(t, tc.name, spec)
		})
	}
}

func TestInfraGoldens(t *testing.T) {
	for _, tc := range infraCorpus {
		t.Run(tc.name, func(t *testing.T) {
			i := testInfra()
			tc.edit(&i)
			spec, err := ForInfra(i)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, tc.name, spec)
		})
	}
}

// compare holds a spec to its golden. The filter's syscalls are another
// library's and depend on the architecture: the golden tells only that there
// is one, and TestSeccomp looks inside.
func compare(t *testing.T, name string, spec *specs.Spec) {
	t.Helper()
	if s := spec.Linux.Seccomp; s != nil {
		if len(s.Syscalls) == 0 {
			t.Error("a filter without syscalls")
		}
		spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: s.DefaultAction, DefaultErrnoRet: s.DefaultErrnoRet}
	}
	got, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update writes it anew); got\n%s", file, got)
	}
}
