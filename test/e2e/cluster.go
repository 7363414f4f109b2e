package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/podshim/podshim/test/images"
)

// Cluster is a kubelet with an API server, which runs as kubeadm has it: etcd and the
// API server are static pods of this kubelet, on this podshim. There is no scheduler and
// no controller: a pod names its node, and what a controller would make a test makes.
type Cluster struct {
	*Kubelet
	api
}

// api is the way to the API server.
type api struct {
	server, config, kubectl string
	// unreachable tells the errors of kubelet before and after the API server's life.
	unreachable *regexp.Regexp
}

// token is that of the only user; the servers are on loopback.
const token = "podshim-test"

// StartCluster runs a podshim, a kubelet, and on them etcd and an API server.
func StartCluster(t TB, opts Options) *Cluster {
	t.Helper()
	program := find(t)
	tools := filepath.Dir(program)
	for _, name := range []string{"kube-apiserver", "kubectl"} {
		if _, err := os.Stat(filepath.Join(tools, name)); err != nil {
			t.Skipf("SKIPPED: %v (`make kube` builds it)", err)
		}
	}
	k := newKubelet(t, opts)
	c := &Cluster{k, api{kubectl: filepath.Join(tools, "kubectl"), config: k.Dir + "/kubeconfig"}}
	if err := c.writeControlPlane(tools); err != nil {
		t.Fatalf("prepare control plane: %v", err)
	}
	k.kubeconfig = c.config
	k.expect = append(k.expect, c.unreachable)
	t.Cleanup(k.end)
	k.Launch()
	c.waitNode()
	return c
}

// With is the same cluster as a subtest sees it.
func (c *Cluster) With(t TB) *Cluster { return &Cluster{c.Kubelet.With(t), c.api} }

func (c *Cluster) writeControlPlane(tools string) error {
	var ports [3]int
	for i := range ports {
		var err error
		if ports[i], err = freePort(); err != nil {
			return err
		}
	}
	dir := c.Dir + "/control-plane"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := writeKey(dir + "/service-account.key"); err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/tokens.csv", []byte(token+",admin,admin,system:masters\n"), 0o600); err != nil {
		return err
	}
	c.server = fmt.Sprintf("https://127.0.0.1:%d", ports[2])
	// The parts of kubelet that speak with the API server, and never with podshim, complain
	// before it knows the node, when the machine is too busy for it, and after its end. The
	// API server makes its namespaces when it answers already.
	c.unreachable = regexp.MustCompile(regexp.QuoteMeta(strings.TrimPrefix(c.server, "https://")) +
		`|^E\d{4} \S+ +\d+ (controller|event|kubelet_node_status|nodelease|reflector|request|status_manager)\.go:` +
		`|nodes? \\?"node\\?" not found|namespaces \\?"kube-system\\?" not found|not registered`)
	config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- {name: test, cluster: {server: "%s", insecure-skip-tls-verify: true}}
users:
- {name: admin, user: {token: %s}}
contexts:
- {name: test, context: {cluster: test, user: admin}}
current-context: test
`, c.server, token)
	if err := os.WriteFile(c.config, []byte(config), 0o600); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etcd":           fmt.Sprintf(etcdManifest, images.Etcd, ports[0], ports[1]),
		"kube-apiserver": fmt.Sprintf(apiserverManifest, nodeName, images.Busybox, ports[0], ports[2], tools, dir),
	} {
		if err := os.WriteFile(filepath.Join(c.Manifests, name+".yaml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// writeKey makes the key that signs the tokens of service accounts.
func writeKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

const etcdManifest = `apiVersion: v1
kind: Pod
metadata:
  name: etcd
  namespace: kube-system
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 5
  containers:
  - name: etcd
    image: %[1]s
    command:
    - /usr/local/bin/etcd
    - --data-dir=/var/lib/etcd
    - --unsafe-no-fsync
    - --listen-client-urls=http://127.0.0.1:%[2]d
    - --advertise-client-urls=http://127.0.0.1:%[2]d
    - --listen-peer-urls=http://127.0.0.1:%[3]d
    - --initial-advertise-peer-urls=http://127.0.0.1:%[3]d
    - --initial-cluster=default=http://127.0.0.1:%[3]d
`

// The API server reaches kubelet by the node's name, which only its own /etc/hosts has.
const apiserverManifest = `apiVersion: v1
kind: Pod
metadata:
  name: kube-apiserver
  namespace: kube-system
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 5
  hostAliases:
  - {ip: 127.0.0.1, hostnames: [%[1]s]}
  volumes:
  - {name: tools, hostPath: {path: "%[5]s", type: Directory}}
  - {name: control-plane, hostPath: {path: "%[6]s", type: Directory}}
  containers:
  - name: kube-apiserver
    image: %[2]s
    command:
    - /tools/kube-apiserver
    - --etcd-servers=http://127.0.0.1:%[3]d
    - --bind-address=127.0.0.1
    - --advertise-address=127.0.0.1
    - --secure-port=%[4]d
    - --cert-dir=/tmp
    - --token-auth-file=/control-plane/tokens.csv
    - --authorization-mode=AlwaysAllow
    - --service-cluster-ip-range=10.96.0.0/24
    - --service-account-issuer=https://kubernetes.default.svc
    - --service-account-key-file=/control-plane/service-account.key
    - --service-account-signing-key-file=/control-plane/service-account.key
    - --disable-admission-plugins=ServiceAccount
    - --kubelet-preferred-address-types=Hostname
    - --endpoint-reconciler-type=none
    - --allow-privileged=true
    readinessProbe:
      httpGet: {host: 127.0.0.1, scheme: HTTPS, path: /livez, port: %[4]d}
      periodSeconds: 1
    volumeMounts:
    - {name: tools, mountPath: /tools, readOnly: true}
    - {name: control-plane, mountPath: /control-plane, readOnly: true}
`

// waitNode returns when kubelet has told the API server that its node is ready.
func (c *Cluster) waitNode() {
	c.t.Helper()
	var last string
	if !c.ask(func() bool {
		var err error
		last, err = c.call(http.MethodGet, "/api/v1/nodes/"+nodeName, "", "")
		var node struct {
			Status struct{ Conditions []Condition }
		}
		if err != nil || json.Unmarshal([]byte(last), &node) != nil {
			last = fmt.Sprint(last, err)
			return false
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type == "Ready" && condition.Status == "True" {
				// The API server makes this one soon after its start.
				_, err := c.call(http.MethodGet, "/api/v1/namespaces/default", "", "")
				return err == nil
			}
		}
		return false
	}) {
		c.t.Fatalf("node is not ready after %v: %s\n%s", Limit, last, c.tail(30))
	}
}

// call asks the API server; the body's type is a MIME type.
func (c *Cluster) call(method, path, kind, body string) (string, error) {
	req, err := http.NewRequest(method, c.server+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(answer))
	}
	return string(answer), err
}

// Kubectl runs kubectl as a user does, and returns what it wrote; it must succeed.
func (c *Cluster) Kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.kubectlCommand(args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("kubectl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (c *Cluster) kubectlCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(c.kubectl, append([]string{"--kubeconfig", c.config, "--cache-dir", c.Dir + "/kubectl"}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.Dir}
	return cmd
}

// Apply gives an example of examples/cluster to the API server, as `kubectl apply -f`,
// and has its pod run on the node. Edits are as for Run. All of it goes with the test.
func (c *Cluster) Apply(example string, edits ...string) *Pod {
	c.t.Helper()
	manifest := c.example("cluster/"+example, edits...)
	// There is no scheduler.
	manifest = strings.Replace(manifest, "\nspec:\n", "\nspec:\n  nodeName: "+nodeName+"\n", 1)
	file := filepath.Join(c.Dir, example+".yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		c.t.Fatalf("write %s: %v", file, err)
	}
	c.Kubectl("apply", "-f", file)
	p := &Pod{Name: example, k: c.Kubelet, remove: func() {
		// The pod before the rest: kubelet looks at its class and volumes to the end.
		for _, what := range [][]string{{"pod", example}, {"-f", file}} {
			args := append([]string{"delete", "--ignore-not-found"}, what...)
			if out, err := c.kubectlCommand(args...).CombinedOutput(); err != nil {
				c.t.Errorf("kubectl %q: %v\n%s", args, err, out)
			}
		}
	}}
	c.t.Cleanup(p.end)
	return p
}

// example reads a file below examples.
func (k *Kubelet) example(name string, edits ...string) string {
	k.t.Helper()
	text, err := os.ReadFile("../../examples/" + name + ".yaml")
	if err != nil {
		k.t.Fatalf("read example: %v", err)
	}
	manifest := string(text)
	for len(edits) > 1 {
		if !strings.Contains(manifest, edits[0]) {
			k.t.Fatalf("example %s has no %q", name, edits[0])
		}
		manifest = strings.ReplaceAll(manifest, edits[0], edits[1])
		edits = edits[2:]
	}
	return manifest
}
