package rootfs

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\nnohome:x:7:7:::\nevil:x:-5:0::/:/bin/sh\n"
	group  = "root:x:0:\nwheel:x:10:root,app\nwww-data:x:33:\npredefined:x:50000:app\n"
)

func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, body := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func id(n int64) *int64 { return &n }

func TestLookupUser(t *testing.T) {
	root := tree(t, map[string]string{"etc/passwd": passwd, "etc/group": group})
	for _, tc := range []struct {
		name string
		req  UserRequest
		want User
	}{
		{"nobody asked", UserRequest{}, User{0, 0, []uint32{0, 10}, "/root"}},
		{"image uid with memberships", UserRequest{Image: "1000"}, User{1000, 1000, []uint32{1000, 10, 50000}, "/home/app"}},
		{"strict", UserRequest{Image: "1000", Strict: true, SupplementalGroups: []int64{5}}, User{1000, 1000, []uint32{1000, 5}, "/home/app"}},
		{"image name", UserRequest{Image: "www-data"}, User{33, 33, []uint32{33}, "/var/www"}},
		{"image name and gid", UserRequest{Image: "www-data:1004"}, User{33, 1004, []uint32{1004}, "/var/www"}},
		{"image uid and group name", UserRequest{Image: "1003:wheel"}, User{1003, 10, []uint32{10}, "/"}},
		{"uid not in passwd", UserRequest{Image: "1002"}, User{1002, 0, []uint32{0}, "/"}},
		{"run as user replaces the image's", UserRequest{Image: "33:33", RunAsUser: id(1000)}, User{1000, 1000, []uint32{1000, 10, 50000}, "/home/app"}},
		{"run as group keeps memberships", UserRequest{RunAsUser: id(1000), RunAsGroup: id(99)}, User{1000, 99, []uint32{99, 10, 50000}, "/home/app"}},
		{"number before name", UserRequest{RunAsUser: id(33), RunAsUsername: "app"}, User{33, 33, []uint32{33}, "/var/www"}},
		{"run as name", UserRequest{RunAsUsername: "app", SupplementalGroups: []int64{10, 6}}, User{1000, 1000, []uint32{1000, 10, 50000, 6}, "/home/app"}},
		{"no home", UserRequest{Image: "nohome"}, User{7, 7, []uint32{7}, "/"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := LookupUser(root, tc.req)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestLookupUserRefuses(t *testing.T) {
	root := tree(t, map[string]string{"etc/passwd": passwd, "etc/group": group})
	for name, req := range map[string]UserRequest{
		"unknown user":           {Image: "ghost"},
		"unknown group":          {Image: "app:ghosts"},
		"group without user":     {RunAsGroup: id(5)},
		"negative uid":           {RunAsUser: id(-1)},
		"uid out of range":       {RunAsUser: id(1 << 40)},
		"negative group":         {RunAsUser: id(1), SupplementalGroups: []int64{-1}},
		"negative uid in passwd": {Image: "evil"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := LookupUser(root, req); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func TestLookupUserWithoutFiles(t *testing.T) {
	got, err := LookupUser(t.TempDir(), UserRequest{Image: "5:6"})
	if want := (User{5, 6, []uint32{6}, "/"}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestLookupUserStaysInTheRootfs(t *testing.T) {
	outside := tree(t, map[string]string{"passwd": "victim:x:4242:4242::/secret:\n"})
	root := tree(t, map[string]string{"inner/passwd": "victim:x:1:1::/inner:\n"})
	for _, link := range []string{
		filepath.Join(outside, "passwd"), // absolute: not in the rootfs
		strings.Repeat("../", 20) + outside + "/passwd",
		"/proc/self/root" + outside + "/passwd",
	} {
		replaceLink(t, link, filepath.Join(root, "etc/passwd"))
		if got, err := LookupUser(root, UserRequest{Image: "victim"}); err == nil {
			t.Errorf("link to %s: read the host's file: %+v", link, got)
		}
	}
	replaceLink(t, "/inner/passwd", filepath.Join(root, "etc/passwd")) // absolute, in the rootfs
	if got, err := LookupUser(root, UserRequest{Image: "victim"}); err != nil || got.UID != 1 {
		t.Errorf("link in the rootfs: %+v, %v", got, err)
	}
}

func replaceLink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

func TestLookupUserReadsRegularFilesOnly(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"FIFO":      func(p string) error { return unix.Mkfifo(p, 0o644) },
		"directory": func(p string) error { return os.Mkdir(p, 0o755) },
		"endless":   func(p string) error { return os.WriteFile(p, nil, 0o644) },
		"loop":      func(p string) error { return os.Symlink("passwd", p) },
	} {
		t.Run(name, func(t *testing.T) {
			root := tree(t, map[string]string{"etc/group": group})
			path := filepath.Join(root, "etc/passwd")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			if name == "endless" {
				if err := os.Truncate(path, 1<<40); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := LookupUser(root, UserRequest{Image: "1"}); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func FuzzLookupUser(f *testing.F) {
	f.Add(passwd, group, "app:wheel")
	f.Add("a:x:99999999999999999999:1::\n", "g:x:-1:a\n", "a")
	f.Add(":::::::\n\x00", strings.Repeat("g:x:1:a,", 100), "0:0")
	f.Fuzz(func(t *testing.T, passwd, group, spec string) {
		root := tree(t, map[string]string{"etc/passwd": passwd, "etc/group": group})
		u, err := LookupUser(root, UserRequest{Image: spec})
		if err == nil && (len(u.AdditionalGIDs) == 0 || u.AdditionalGIDs[0] != u.GID || u.Home == "") {
			t.Errorf("incomplete: %+v", u)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("class of %v", err)
		}
	})
}
