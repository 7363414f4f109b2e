// Package cdi gives containers the devices that the Container Device Interface
// describes (https://github.com/cncf-tags/container-device-interface): device
// nodes, mounts, environment and hooks that a vendor's file in a CDI directory
// lists for a device's name.
//
// It is a step of its own, after spec.ForContainer and before the spec goes to
// the monitor, because it reads files:
//
//	err := cdi.Inject(spec, config, cdi.Dirs)
//
// Nothing is read, and nothing costs, for a container without CDI devices.
package cdi

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// Dirs are the directories of the CDI specification, later ones overriding.
var Dirs = []string{"/etc/cdi", "/var/run/cdi"}

// Inject edits spec for the CDI devices that the config names in CDI_devices,
// or in cdi.k8s.io/ annotations as device plugins do that predate the field; a
// device named in both counts once. The directories are read anew each time:
// vendors write files there whenever a driver loads. An unknown device is
// errdefs.ErrNotFound; spec is then unchanged.
func Inject(spec *specs.Spec, config *runtime.ContainerConfig, dirs []string) error {
	devices, err := names(config)
	if err != nil || len(devices) == 0 {
		return err
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(dirs...), cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("read CDI directories: %w", err)
	}
	if missing, err := cache.InjectDevices(spec, devices...); err != nil {
		if len(missing) > 0 {
			return fmt.Errorf("CDI_devices: %v is in no file of %v: %w", missing, dirs, errdefs.ErrNotFound)
		}
		return fmt.Errorf("CDI_devices: %w", err)
	}
	return nil
}

// names are the devices in the order of the field, then of the annotations, sorted.
func names(config *runtime.ContainerConfig) ([]string, error) {
	var devices []string
	for _, d := range config.GetCDIDevices() {
		devices = append(devices, d.GetName())
	}
	_, annotated, err := cdi.ParseAnnotations(config.GetAnnotations())
	if err != nil {
		return nil, fmt.Errorf("annotations: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	slices.Sort(annotated)
	seen := make(map[string]bool)
	return slices.DeleteFunc(append(devices, annotated...), func(name string) bool {
		dup := seen[name]
		seen[name] = true
		return dup
	}), nil
}
