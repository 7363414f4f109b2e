package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// scripted is a Network whose plugins are shell scripts. Each run of a script
// appends "NAME VERB CONTAINERID" to calls.
type scripted struct {
	*Network
	t         *testing.T
	dir       string
	conf, bin string
	calls     string
}

func newScripted(t *testing.T, limit time.Duration, plugins map[string]string, conf string) *scripted {
	t.Helper()
	dir := t.TempDir()
	s := &scripted{
		t: t, dir: dir, conf: filepath.Join(dir, "net.d"), bin: filepath.Join(dir, "bin"),
		calls: filepath.Join(dir, "calls"),
	}
	for _, d := range []string{s.conf, s.bin} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, body := range plugins {
		s.plugin(name, body)
	}
	if conf != "" {
		s.write("10-test.conflist", conf)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	n, err := New(Config{
		ConfDir: s.conf, BinDirs: []string{s.bin}, CacheDir: filepath.Join(dir, "cache"),
		PluginTimeout: limit, Log: logrus.NewEntry(log),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	s.Network = n
	return s
}

func (s *scripted) plugin(name, body string) {
	s.t.Helper()
	script := fmt.Sprintf("#!/bin/sh\necho %s $CNI_COMMAND $CNI_CONTAINERID >>%s\nDIR=%s\n%s\n", name, s.calls, s.dir, body)
	s.replace(filepath.Join(s.bin, name), script, 0o755)
}

func (s *scripted) write(name, conf string) {
	s.t.Helper()
	s.replace(filepath.Join(s.conf, name), conf, 0o644)
}

func (s *scripted) replace(path, content string, mode os.FileMode) {
	s.t.Helper()
	if err := os.WriteFile(path+"~", []byte(content), mode); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+"~", path); err != nil {
		s.t.Fatal(err)
	}
}

// runs are the lines of calls for one container, without its ID.
func (s *scripted) runs(id string) []string {
	b, err := os.ReadFile(s.calls)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if run, ok := strings.CutSuffix(strings.TrimSpace(line), " "+id); ok {
			out = append(out, run)
		}
	}
	return out
}

// cacheFiles are the files left of all pods.
func (s *scripted) cacheFiles() []string {
	left, err := filepath.Glob(filepath.Join(s.dir, "cache", "*", "*"))
	if err != nil {
		s.t.Fatal(err)
	}
	return left
}

// await waits until Status satisfies ok; the limit is what the package promises.
func (s *scripted) await(what string, ok func(error) bool) {
	s.t.Helper()
	for end := time.Now().Add(5 * time.Second); ; {
		err := s.Status()
		if ok(err) {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("%s: after 5 s Status still says: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond) // Status has no event of its own
	}
}

func isNil(err error) bool { return err == nil }

func says(text string) func(error) bool {
	return func(err error) bool { return err != nil && strings.Contains(err.Error(), text) }
}

const (
	giveIP = `[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0","interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/x"}],
"ips":[{"interface":1,"address":"10.9.8.7/24"},{"interface":0,"address":"10.1.1.1/24"},{"interface":1,"address":"fd00::7/64"}]}'; exit 0`
	pass    = `[ $CNI_COMMAND = ADD ] && sed 's/.*"prevResult":\({.*}\),"type".*/\1/'; exit 0`
	oneConf = `{"cniVersion":"1.0.0","name":"one","plugins":[{"type":"first"}]}`
	twoConf = `{"cniVersion":"1.0.0","name":"two","plugins":[{"type":"first"},{"type":"second"}]}`
)

func testPod(id string) Pod {
	return Pod{ID: id, Name: "web", Namespace: "shop", UID: "u-1", Netns: "/nonexistent/netns"}
}

func TestAddGivesTheAddressesOfEth0(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP}, oneConf)
	r, err := s.Add(t.Context(), testPod("p1"))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.IPs); got != "[10.9.8.7 fd00::7]" || r.Interface != "eth0" || !json.Valid(r.Raw) {
		t.Errorf("result: %s on %s, raw %s", got, r.Interface, r.Raw)
	}
	for range 2 {
		if err := s.Del(t.Context(), Pod{ID: "p1"}); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.runs("p1"); !slices.Equal(got, []string{"first ADD", "first DEL"}) {
		t.Errorf("plugins ran: %q", got)
	}
	if left := s.cacheFiles(); len(left) != 0 {
		t.Errorf("cache files left: %q", left)
	}
}

func TestArgumentsAndCapabilities(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{
		"first": `cat >$DIR/$CNI_COMMAND.stdin; echo "$CNI_ARGS $CNI_IFNAME" >$DIR/$CNI_COMMAND.args; ` + giveIP,
	}, `{"cniVersion":"1.0.0","name":"one","plugins":[{"type":"first","capabilities":
		{"portMappings":true,"bandwidth":true,"ips":true,"mac":true,"cgroupPath":true,"dns":false,"io.kubernetes.cri.pod-annotations":true}}]}`)
	pod := testPod("p1")
	pod.PortMappings = []PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "TCP"}, {ContainerPort: 9}}
	pod.CgroupParent = "/kubepods/pod1"
	pod.DNS = &DNS{Servers: []string{"10.0.0.10"}}
	if err := pod.ReadAnnotations(map[string]string{
		"kubernetes.io/ingress-bandwidth": "10M", "cni.podshim.io/ips": "10.9.8.7/24", "cni.podshim.io/mac": "02:00:00:00:00:07",
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	// DEL gets what ADD got, whatever has become of the configuration.
	if err := os.RemoveAll(s.conf); err != nil {
		t.Fatal(err)
	}
	s.await("directory removed", says("no CNI configuration"))
	if err := s.Del(t.Context(), Pod{ID: "p1"}); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"ADD", "DEL"} {
		var in struct {
			RuntimeConfig map[string]any `json:"runtimeConfig"`
			PrevResult    any            `json:"prevResult"`
		}
		raw, err := os.ReadFile(filepath.Join(s.dir, verb+".stdin"))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, &in); err != nil {
			t.Fatal(err)
		}
		got, _ := json.Marshal(in.RuntimeConfig)
		want := `{"bandwidth":{"ingressBurst":4294967295,"ingressRate":10000000},"cgroupPath":"/kubepods/pod1",` +
			`"io.kubernetes.cri.pod-annotations":{"cni.podshim.io/ips":"10.9.8.7/24","cni.podshim.io/mac":"02:00:00:00:00:07",` +
			`"kubernetes.io/ingress-bandwidth":"10M"},"ips":["10.9.8.7/24"],"mac":"02:00:00:00:00:07",` +
			`"portMappings":[{"containerPort":80,"hostPort":8080,"protocol":"tcp"}]}`
		if string(got) != want {
			t.Errorf("%s runtimeConfig:\n%s, want\n%s", verb, got, want)
		}
		if verb == "DEL" && in.PrevResult == nil {
			t.Error("DEL got no prevResult")
		}
		args, _ := os.ReadFile(filepath.Join(s.dir, verb+".args"))
		if got, want := strings.TrimSpace(string(args)), "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;"+
			"K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u-1 eth0"; got != want {
			t.Errorf("%s CNI_ARGS: %s, want %s", verb, got, want)
		}
	}
}

// TestFailedAddHoldsNothing fails an ADD in every way a plugin can, after an
// address was taken by the plugin before it.
func TestFailedAddHoldsNothing(t *testing.T) {
	take := `case $CNI_COMMAND in ADD) touch $DIR/ip-$CNI_CONTAINERID;; DEL) rm -f $DIR/ip-$CNI_CONTAINERID;; esac
` + giveIP
	for name, c := range map[string]struct {
		second string
		want   []string // parts of the error
		class  func(error) bool
	}{
		"says no": {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"code":103,"msg":"no route","details":"table 7"}'; exit 1`,
			[]string{"attach pod shop/web (p1)", `network "two"`, "plugin second (ADD): no route: table 7 (code 103)"}, nil},
		"try again later": {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"code":11,"msg":"not yet"}'; exit 1`,
			[]string{"not yet"}, errdefs.IsUnavailable},
		"dies wordless": {`[ $CNI_COMMAND = DEL ] && exit 0; exit 3`, []string{"plugin second (ADD): exit status 3"}, nil},
		"stderr":        {`[ $CNI_COMMAND = DEL ] && exit 0; echo "panic: x" >&2; exit 2`, []string{"exit status 2; stderr: panic: x"}, nil},
		"hangs": {`[ $CNI_COMMAND = DEL ] && exit 0; sleep 321 & echo $! >$DIR/sleeper; wait`,
			[]string{"plugin second (ADD): no answer in 300ms, killed", "raise the plugin time limit"}, errdefs.IsUnavailable},
		"garbage":     {`[ $CNI_COMMAND = DEL ] && exit 0; echo hello; exit 0`, []string{"no CNI result: hello"}, nil},
		"silent":      {`exit 0`, []string{"answered nothing"}, nil},
		"JSON null":   {`[ $CNI_COMMAND = DEL ] && exit 0; echo null; exit 0`, []string{"no CNI result: null"}, nil},
		"null entry":  {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion":"1.0.0","interfaces":[null]}'; exit 0`, []string{"interfaces has an empty entry"}, nil},
		"no IP":       {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion":"1.0.0"}'; exit 0`, []string{"gave eth0 no IP address"}, nil},
		"empty IP":    {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion":"1.0.0","ips":[{}]}'; exit 0`, []string{"an IP without address"}, nil},
		"IP nowhere":  {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion":"1.0.0","ips":[{"interface":7,"address":"10.0.0.1/8"}]}'; exit 0`, []string{"interface 7 of 0"}, nil},
		"bad version": {`[ $CNI_COMMAND = DEL ] && exit 0; echo '{"cniVersion":"9.9.9"}'; exit 0`, []string{"9.9.9"}, nil},
		"floods":      {`[ $CNI_COMMAND = DEL ] && exit 0; exec yes`, []string{"more than 1048576 bytes of output, killed"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limit := 20 * time.Second
			if name == "hangs" {
				limit = 300 * time.Millisecond
			}
			s := newScripted(t, limit, map[string]string{"first": take, "second": c.second}, twoConf)
			_, err := s.Add(t.Context(), testPod("p1"))
			if err == nil {
				t.Fatal("Add succeeded")
			}
			for _, part := range c.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not say %q", err, part)
				}
			}
			if c.class != nil && !c.class(err) {
				t.Errorf("error %v has the wrong class", err)
			}
			if len(err.Error()) > 4096 || strings.Contains(err.Error(), "failed to") {
				t.Errorf("unfit error: %.5000s", err)
			}
			if got := s.runs("p1"); !slices.Equal(got, []string{"first ADD", "second ADD", "second DEL", "first DEL"}) {
				t.Errorf("plugins ran: %q", got)
			}
			if _, err := os.Stat(filepath.Join(s.dir, "ip-p1")); !errors.Is(err, os.ErrNotExist) {
				t.Error("the address is still taken")
			}
			if left := s.cacheFiles(); len(left) != 0 {
				t.Errorf("cache files left: %q", left)
			}
			if pid, err := os.ReadFile(filepath.Join(s.dir, "sleeper")); err == nil {
				awaitGone(t, strings.TrimSpace(string(pid)))
			}
			// The same request must succeed once the plugin does.
			s.plugin("second", pass)
			if r, err := s.Add(t.Context(), testPod("p1")); err != nil || len(r.IPs) != 2 {
				t.Errorf("after the plugin was repaired: %v, %v", r, err)
			}
		})
	}
}

// awaitGone waits until a killed process is dead; its new parent may be slow to
// reap it.
func awaitGone(t *testing.T, pid string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %s of the killed plugin runs on: %s", pid, stat)
		}
	}
}

func TestCallerGivesUp(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{
		"first": `[ $CNI_COMMAND = DEL ] && exit 0; mkfifo $DIR/at; echo >$DIR/at; sleep 321`,
	}, oneConf)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			if f, err := os.Open(filepath.Join(s.dir, "at")); err == nil { // opens when the plugin writes
				f.Close()
				cancel()
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	_, err := s.Add(ctx, testPod("p1"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Add: %v, want Canceled", err)
	}
	if got := s.runs("p1"); !slices.Equal(got, []string{"first ADD", "first DEL"}) {
		t.Errorf("plugins ran: %q; want the undo although the caller is gone", got)
	}
	if left := s.cacheFiles(); len(left) != 0 {
		t.Errorf("cache files left: %q", left)
	}
}

func TestFailedDelCanBeRetried(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{
		"first": `[ $CNI_COMMAND = DEL ] && [ -e $DIR/broken ] && exit 1;` + giveIP,
	}, oneConf)
	if _, err := s.Add(t.Context(), testPod("p1")); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(s.dir, "broken")
	if err := os.WriteFile(broken, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Del(t.Context(), Pod{ID: "p1"}); err == nil || !strings.Contains(err.Error(), "detach pod shop/web (p1)") {
		t.Errorf("Del with a failing plugin: %v", err)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	if err := s.Del(t.Context(), Pod{ID: "p1"}); err != nil {
		t.Error(err)
	}
	if left := s.cacheFiles(); len(left) != 0 {
		t.Errorf("cache files left: %q", left)
	}
}

// TestNextProcessFinishes: what a daemon that died had attached, or was
// attaching, the next one detaches.
func TestNextProcessFinishes(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP}, oneConf)
	for _, id := range []string{"kept", "stale", "spoilt"} {
		if _, err := s.Add(t.Context(), testPod(id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got := s.runs("stale"); !slices.Equal(got, []string{"first ADD"}) {
		t.Fatalf("GC took a pod that this process has attached: %q", got)
	}
	if err := os.WriteFile(s.attachmentPath("spoilt"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := s.cfg
	s.Close()
	next, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if err := next.GC(t.Context(), []Pod{{ID: "kept"}}); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string][]string{
		"kept": {"first ADD"}, "stale": {"first ADD", "first DEL"}, "spoilt": {"first ADD", "first DEL"},
	} {
		if got := s.runs(id); !slices.Equal(got, want) {
			t.Errorf("%s: plugins ran %q, want %q", id, got, want)
		}
	}
	if err := next.Check(t.Context(), Pod{ID: "kept"}); err != nil {
		t.Errorf("CHECK of the kept pod: %v", err)
	}
	if err := next.Check(t.Context(), Pod{ID: "stale"}); !errdefs.IsNotFound(err) {
		t.Errorf("CHECK of the collected pod: %v, want NotFound", err)
	}
	if got := s.runs("kept"); !slices.Equal(got, []string{"first ADD", "first CHECK"}) {
		t.Errorf("kept: plugins ran %q", got)
	}
}

func TestGCVerbRunsAlone(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{
		"first": `[ $CNI_COMMAND = GC ] && cat >$DIR/gc; [ $CNI_COMMAND = ADD ] && [ $CNI_CONTAINERID = slow ] && cat $DIR/gate >/dev/null
` + giveIP,
	}, strings.Replace(oneConf, "1.0.0", "1.1.0", 1))
	if err := unix.Mkfifo(filepath.Join(s.dir, "gate"), 0o600); err != nil {
		t.Fatal(err)
	}
	added := make(chan error, 1)
	go func() {
		_, err := s.Add(t.Context(), testPod("slow"))
		added <- err
	}()
	gate, err := os.OpenFile(filepath.Join(s.dir, "gate"), os.O_WRONLY, 0) // opens when ADD reads
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.GC(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("GC beside a running ADD: %v, want DeadlineExceeded", err)
	}
	if _, err := s.Add(t.Context(), testPod("quick")); err != nil {
		t.Errorf("ADD after a GC that gave up: %v", err)
	}
	gate.Close()
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if err := s.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	in, err := os.ReadFile(filepath.Join(s.dir, "gc"))
	if err != nil || !strings.Contains(string(in), `"containerID":"quick"`) || !strings.Contains(string(in), `"containerID":"slow"`) {
		t.Errorf("GC's input: %s, %v; want both pods valid", in, err)
	}
}

func TestStatusFollowsTheDirectory(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP, "second": giveIP}, "")
	parent := filepath.Dir(s.conf)
	s.await("empty", says("no CNI configuration in "+s.conf))
	s.write("50-b.conflist", twoConf)
	s.await("appears", isNil)
	s.write("10-a.conf", `{"cniVersion":"0.4.0","name":"single","type":"first"}`)
	s.await("an earlier one appears", func(error) bool { return s.Info().Network == "single" })
	s.write("10-a.conf", `{"cniVersion`)
	s.await("a typing error", says("CNI configuration "+s.conf+"/10-a.conf: "))
	s.write("10-a.conf", `{"cniVersion":"0.4.0","name":"single","type":"absent"}`)
	s.await("a missing plugin", says("plugin absent (find): not in "+s.bin+"; install it"))
	s.plugin("absent", giveIP)
	s.await("the plugin is installed", isNil)
	for _, c := range []struct{ conf, want string }{
		{`{"cniVersion":"7.0.0","name":"n","plugins":[{"type":"first"}]}`, "newer than"},
		{`{"cniVersion":"1.0.0","name":"../n","plugins":[{"type":"first"}]}`, "name"},
		{`{"cniVersion":"1.0.0","name":"n","plugins":[]}`, "no plugins"},
		{`{"cniVersion":"1.0.0","name":"n"}`, "no plugins"},
		{`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"first","ipam":{"type":"nowhere"}}]}`, "plugin nowhere (find)"},
		{strings.Repeat(" ", maxConf+1), "larger than"},
	} {
		s.write("00-bad.conflist", c.conf)
		s.await(c.conf[:min(60, len(c.conf))], says(c.want))
	}
	for range 2 {
		if err := os.RemoveAll(s.conf); err != nil {
			t.Fatal(err)
		}
		s.await("vanishes", says("no CNI configuration"))
		if err := os.Mkdir(s.conf, 0o755); err != nil {
			t.Fatal(err)
		}
		s.write("50-b.conflist", twoConf)
		s.await("comes back", isNil)
	}
	if err := os.Rename(parent, parent+"-away"); err != nil {
		t.Fatal(err)
	}
	s.await("the parent vanishes", says("no CNI configuration"))
	if err := os.MkdirAll(s.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(parent+"-away", "bin"), s.bin); err != nil {
		t.Fatal(err)
	}
	s.write("50-b.conflist", twoConf)
	s.await("another parent comes", isNil)
	info := s.Info()
	if info.Network != "two" || len(info.Plugins) != 2 || len(info.Files) != 1 || info.Error != "" {
		t.Errorf("info: %+v", info)
	}
	if err := os.RemoveAll(parent + "-away"); err != nil {
		t.Fatal(err)
	}
}

func TestNamedNetwork(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP, "second": giveIP}, oneConf)
	s.write("20.conflist", twoConf)
	s.write("00.conflist", "{")
	cfg := s.cfg.withDefaults()
	cfg.Network = "two"
	if l := load(cfg, s.runner); l.err != nil || l.list.Name != "two" || l.files[0].Error == "" {
		t.Errorf("loaded %+v", l)
	}
	cfg.Network = "three"
	if l := load(cfg, s.runner); !says(`has the network "three"`)(l.err) {
		t.Errorf("error %v", l.err)
	}
}

func TestStatusVerbNeverBlocks(t *testing.T) {
	s := newScripted(t, 500*time.Millisecond, map[string]string{
		"first": `if [ $CNI_COMMAND = STATUS ]; then [ -e $DIR/hang ] && sleep 321; [ -e $DIR/sick ] && { echo '{"code":50,"msg":"agent down"}'; exit 1; }; exit 0; fi
` + giveIP,
	}, "")
	hang, sick := filepath.Join(s.dir, "hang"), filepath.Join(s.dir, "sick")
	for _, f := range []string{hang, sick} {
		if err := os.WriteFile(f, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.write("10.conflist", strings.Replace(oneConf, "1.0.0", "1.1.0", 1))
	slowest := time.Duration(0)
	s.await("a hanging STATUS", func(error) bool {
		start := time.Now()
		err := s.Status()
		slowest = max(slowest, time.Since(start))
		return says("plugin first (STATUS): no answer in 500ms")(err)
	})
	if slowest > 100*time.Millisecond {
		t.Errorf("Status took %s", slowest)
	}
	if err := os.Remove(hang); err != nil {
		t.Fatal(err)
	}
	touch := func() {
		s.write("10.conflist", strings.Replace(oneConf, "1.0.0", "1.1.0", 1)+"\n")
	}
	touch()
	s.await("a sick plugin", says("plugin first (STATUS): agent down (code 50)"))
	if err := os.Remove(sick); err != nil {
		t.Fatal(err)
	}
	touch()
	s.await("a sound plugin", isNil)
}

// TestStatusIsAskedAgain: the plugin's answer changes with no file changing.
func TestStatusIsAskedAgain(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the age of an answer, 5 s")
	}
	t.Parallel()
	s := newScripted(t, time.Minute, map[string]string{
		"first": `[ $CNI_COMMAND = STATUS ] && [ -e $DIR/sick ] && { echo '{"code":50,"msg":"agent down"}'; exit 1; }; exit 0`,
	}, strings.Replace(oneConf, "1.0.0", "1.1.0", 1))
	s.await("sound", isNil)
	if err := os.WriteFile(filepath.Join(s.dir, "sick"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	if err := watcher.Add(s.calls); err != nil {
		t.Fatal(err)
	}
	s.Status()
	select {
	case <-watcher.Events: // the plugin was run
	case <-time.After(statusAge + 2*lookAgain):
		t.Fatal("the plugins were not asked again")
	}
	s.await("sick", says("agent down"))
}

func TestOneSlowPodHoldsUpNoOther(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{
		"first": `[ $CNI_COMMAND = ADD ] && [ $CNI_CONTAINERID = slow ] && cat $DIR/gate >/dev/null
` + giveIP,
	}, oneConf)
	if err := unix.Mkfifo(filepath.Join(s.dir, "gate"), 0o600); err != nil {
		t.Fatal(err)
	}
	slow := make(chan error, 1)
	go func() {
		_, err := s.Add(t.Context(), testPod("slow"))
		slow <- err
	}()
	gate, err := os.OpenFile(filepath.Join(s.dir, "gate"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			pod := testPod(fmt.Sprint("p", i))
			if _, err := s.Add(t.Context(), pod); err != nil {
				t.Error(err)
			}
			if err := s.Del(t.Context(), pod); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	// DEL of the slow pod waits its turn.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Del(ctx, Pod{ID: "slow"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("DEL beside ADD of the same pod: %v", err)
	}
	gate.Close()
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

func TestBadPods(t *testing.T) {
	s := newScripted(t, time.Minute, map[string]string{"first": giveIP}, oneConf)
	for name, edit := range map[string]func(*Pod){
		"no ID":          func(p *Pod) { p.ID = "" },
		"ID with slash":  func(p *Pod) { p.ID = "../x" },
		"no netns":       func(p *Pod) { p.Netns = "" },
		"forged args":    func(p *Pod) { p.Name = "x;K8S_POD_NAMESPACE=kube-system" },
		"forged UID":     func(p *Pod) { p.UID = "a=b" },
		"newline in arg": func(p *Pod) { p.Namespace = "a\nb" },
	} {
		pod := testPod("p1")
		edit(&pod)
		if _, err := s.Add(t.Context(), pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	if err := s.Del(t.Context(), Pod{ID: "../x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Del: %v, want InvalidArgument", err)
	}
	if left := s.cacheFiles(); len(left) != 0 {
		t.Errorf("cache files: %q", left)
	}
}

func TestAddWithoutNetwork(t *testing.T) {
	s := newScripted(t, time.Minute, nil, "")
	if _, err := s.Add(t.Context(), testPod("p1")); !errdefs.IsUnavailable(err) || !says("no CNI configuration")(err) {
		t.Errorf("%v, want Unavailable with the reason", err)
	}
	if err := s.Del(t.Context(), testPod("p1")); err != nil {
		t.Errorf("Del: %v", err)
	}
}

func TestAnnotations(t *testing.T) {
	for in, want := range map[string]uint64{"1k": 1000, "10M": 10e6, "1.5G": 15e8, "1Mi": 1 << 20, "1500": 1500, "1000.5": 1001, "1P": 1e15} {
		p := Pod{}
		if err := p.ReadAnnotations(map[string]string{annotationEgress: in}); err != nil || p.Bandwidth.EgressRate != want {
			t.Errorf("%s: %+v, %v; want %d", in, p.Bandwidth, err, want)
		}
	}
	for _, bad := range []map[string]string{
		{annotationIngress: ""}, {annotationIngress: "999"}, {annotationIngress: "2P"}, {annotationIngress: "-1M"},
		{annotationIngress: "1e999999999"}, {annotationIngress: "1/3M"}, {annotationIngress: "1Mk"}, {annotationEgress: "fast"},
		{annotationIPs: "10.0.0"}, {annotationIPs: "10.0.0.1,"}, {annotationMAC: "02:00"},
	} {
		p := Pod{Name: "x"}
		if err := p.ReadAnnotations(bad); !errdefs.IsInvalidArgument(err) || p.Annotations != nil {
			t.Errorf("%v: %v, %+v; want InvalidArgument and no change", bad, err, p)
		}
	}
}
