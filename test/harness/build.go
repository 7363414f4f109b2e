package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
)

// Binaries is the directory that holds podshim and podmon.
var Binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("PODSHIM_BIN_DIR"); dir != "" {
		return dir, needFiles(dir, "podshim", "podmon")
	}
	dir, err := os.MkdirTemp("", "podshim-bin-")
	if err != nil {
		return "", err
	}
	built = dir
	// make knows the flags: podmon must be static.
	build := exec.Command("make", "build", "BIN="+dir)
	build.Dir = repository()
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build podshim and podmon: %w\n%s", err, out)
	}
	return dir, nil
})

// built is the directory Binaries has made; "" when it has made none.
var built string

// removeBinaries takes away what Binaries has built.
func removeBinaries() {
	if built != "" {
		_ = os.RemoveAll(built)
	}
}

// Tools is the directory of the outside programs: CNI plugins and crictl.
var Tools = sync.OnceValues(func() (string, error) {
	dir := os.Getenv("PODSHIM_TOOLS_DIR")
	if dir == "" {
		dir = filepath.Join(repository(), "_artifacts", "tools")
	}
	err := needFiles(dir, "bridge", "host-local", "portmap", "crictl")
	if err != nil {
		err = fmt.Errorf("%w (`make tools` builds them; PODSHIM_TOOLS_DIR says where they are)", err)
	}
	return dir, err
})

func needFiles(dir string, names ...string) error {
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// repository is the root of the source tree this package was compiled from.
func repository() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}
