package spec

import "path"

// scopePrefix names podshim's scopes under the systemd driver:
// podshim-<id>.scope in the pod's slice.
const scopePrefix = "podshim"

// CgroupsPath is the OCI cgroupsPath of a container (or sandbox) below parent,
// in the driver's own notation: "<parent>/<id>" for cgroupfs, and
// "<slice>:podshim:<id>" for systemd, where the last element of a path like
// /kubepods.slice/kubepods-pod1.slice names the slice completely. Without a
// parent it is below /podshim or in system.slice.
func CgroupsPath(parent, id string, systemd bool) string {
	if systemd {
		slice := "system.slice"
		if parent != "" {
			slice = path.Base(parent)
		}
		return slice + ":" + scopePrefix + ":" + id
	}
	return path.Join("/", firstOf(parent, scopePrefix), id)
}
