package pod

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// podshim's own metrics tell what it was asked for and what it holds.
func TestOwnMetrics(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	n := harness.Start(t, harness.Options{Config: fmt.Sprintf("[metrics]\naddress = %q", address)})
	p := n.RunPod()
	p.Run(sleeper)
	p.Shell("exit 0").WaitExit()
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`podshim_cri_call_duration_seconds_count{code="OK",method="RunPodSandbox"} 1`,
		`podshim_cri_call_duration_seconds_count{code="OK",method="StartContainer"} 2`,
		`podshim_cri_call_duration_seconds_count{code="OK",method="PullImage"} 1`,
		`podshim_pods{state="ready"} 1`, `podshim_containers{state="running"} 1`, `podshim_containers{state="exited"} 1`,
		`podshim_podmon_starts_total 1`,
	} {
		if !strings.Contains(string(body), want+"\n") {
			t.Errorf("metrics lack %s", want)
		}
	}
}
