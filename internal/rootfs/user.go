package rootfs

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/user"
)

// UserRequest says as whom a process is to run: what the image wants and what
// the caller (CRI LinuxContainerSecurityContext) puts in its place.
type UserRequest struct {
	// Image is the image's USER: "", "user", "uid", "user:group", "uid:gid"...
	Image string
	// RunAsUser and RunAsUsername replace the image's user; the number wins.
	RunAsUser     *int64
	RunAsUsername string
	// RunAsGroup needs one of them (CRI: "the runtime MUST error" otherwise).
	RunAsGroup *int64
	// SupplementalGroups are added.
	SupplementalGroups []int64
	// Strict leaves out the groups that the image's /etc/group has the user in
	// (CRI SupplementalGroupsPolicy_Strict).
	Strict bool
}

// User is the answer.
type User struct {
	UID, GID uint32
	// AdditionalGIDs begin with GID and have no duplicates.
	AdditionalGIDs []uint32
	// Home is from /etc/passwd; "/" for a user that is not in it.
	Home string
}

// LookupUser resolves req against /etc/passwd and /etc/group of a mounted root
// filesystem. A name that is not there, a number out of range, or a file that is
// no regular file is errdefs.ErrInvalidArgument.
func LookupUser(rootfs string, req UserRequest) (User, error) {
	spec, err := req.spec()
	if err != nil {
		return User{}, err
	}
	passwd, err := readFile(rootfs, "/etc/passwd")
	if err != nil {
		return User{}, err
	}
	group, err := readFile(rootfs, "/etc/group")
	if err != nil {
		return User{}, err
	}
	found, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return User{}, fmt.Errorf("user %q: %w: %w", spec, err, errdefs.ErrInvalidArgument)
	}
	if found.Uid < 0 || found.Uid > math.MaxInt32 || found.Gid < 0 || found.Gid > math.MaxInt32 {
		return User{}, fmt.Errorf("user %q: the image's /etc/passwd gives it %d:%d: %w", spec, found.Uid, found.Gid, errdefs.ErrInvalidArgument)
	}
	u := User{UID: uint32(found.Uid), GID: uint32(found.Gid), Home: found.Home}
	if u.Home == "" {
		u.Home = "/"
	}
	u.add(u.GID)
	if !req.Strict {
		name, _, _ := strings.Cut(spec, ":")
		if err := u.addMemberships(passwd, group, name); err != nil {
			return User{}, err
		}
	}
	for _, g := range req.SupplementalGroups {
		if g < 0 || g > math.MaxInt32 {
			return User{}, fmt.Errorf("supplemental group %d: %w", g, errdefs.ErrInvalidArgument)
		}
		u.add(uint32(g))
	}
	return u, nil
}

// spec is the user in the image's notation.
func (r UserRequest) spec() (string, error) {
	spec := r.RunAsUsername
	if r.RunAsUser != nil {
		spec = strconv.FormatInt(*r.RunAsUser, 10)
	}
	if r.RunAsGroup == nil {
		if spec == "" {
			return r.Image, nil
		}
		return spec, nil
	}
	if spec == "" {
		return "", fmt.Errorf("run_as_group needs run_as_user or run_as_username: %w", errdefs.ErrInvalidArgument)
	}
	return spec + ":" + strconv.FormatInt(*r.RunAsGroup, 10), nil
}

func (u *User) add(gid uint32) {
	if !slices.Contains(u.AdditionalGIDs, gid) {
		u.AdditionalGIDs = append(u.AdditionalGIDs, gid)
	}
}

// addMemberships adds the groups that list the user as a member. A number stands
// for the first name it has in passwd.
func (u *User) addMemberships(passwd, group []byte, name string) error {
	if _, err := strconv.Atoi(name); err == nil || name == "" {
		users, err := user.ParsePasswdFilter(bytes.NewReader(passwd), func(p user.User) bool { return p.Uid == int(u.UID) })
		if err != nil {
			return fmt.Errorf("read /etc/passwd of the image: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if len(users) == 0 {
			return nil
		}
		name = users[0].Name
	}
	groups, err := user.ParseGroupFilter(bytes.NewReader(group), func(g user.Group) bool { return slices.Contains(g.List, name) })
	if err != nil {
		return fmt.Errorf("read /etc/group of the image: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, g := range groups {
		if g.Gid < 0 || g.Gid > math.MaxInt32 {
			return fmt.Errorf("group %d of the image is out of range: %w", g.Gid, errdefs.ErrInvalidArgument)
		}
		u.add(uint32(g.Gid))
	}
	return nil
}
