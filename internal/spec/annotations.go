package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The annotations by which tools that look at OCI specs (node agents, NRI
// plugins, debuggers) know whose container it is. The names are containerd's,
// which those tools were written for.
const (
	annotationType         = "io.kubernetes.cri.container-type"
	annotationSandboxID    = "io.kubernetes.cri.sandbox-id"
	annotationSandboxName  = "io.kubernetes.cri.sandbox-name"
	annotationNamespace    = "io.kubernetes.cri.sandbox-namespace"
	annotationUID          = "io.kubernetes.cri.sandbox-uid"
	annotationContainer    = "io.kubernetes.cri.container-name"
	annotationImage        = "io.kubernetes.cri.image-name"
	annotationSandboxImage = "io.kubernetes.cri.podsandbox.image-name"
	annotationLogDir       = "io.kubernetes.cri.sandbox-log-directory"
	// annotationStopSignal is the one the OCI image spec defines for it.
	annotationStopSignal = "org.opencontainers.image.stopSignal"
)

func podAnnotations(p Pod, kind string) map[string]string {
	meta := p.Config.GetMetadata()
	return map[string]string{
		annotationType:        kind,
		annotationSandboxID:   p.ID,
		annotationSandboxName: meta.GetName(),
		annotationNamespace:   meta.GetNamespace(),
		annotationUID:         meta.GetUid(),
	}
}

func containerAnnotations(c Container) map[string]string {
	a := podAnnotations(c.Pod, "container")
	a[annotationContainer] = c.Config.GetMetadata().GetName()
	image := c.Config.GetImage()
	a[annotationImage] = firstOf(image.GetUserSpecifiedImage(), image.GetImage())
	if s := c.Image.StopSignal; s != "" && !hasNUL(s) {
		a[annotationStopSignal] = s
	}
	if s := c.Config.GetStopSignal(); s != runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
		a[annotationStopSignal] = signalName(s)
	}
	return a
}

// SandboxImage is the image that an infra container was described with; "" is the
// embedded pause.
func SandboxImage(infra *specs.Spec) string { return infra.Annotations[annotationSandboxImage] }

// The annotations that name an RDT or blockio class. Kubernetes has no fields
// for them; containerd and CRI-O read the same annotations.
const (
	rdtContainer     = "io.kubernetes.cri.rdt-class"
	rdtPod           = "rdt.resources.beta.kubernetes.io/"
	blockioContainer = "io.kubernetes.cri.blockio-class"
	blockioPod       = "blockio.resources.beta.kubernetes.io/"
)

// applyClasses gives the container the RDT and blockio class its annotations
// name. A class the machine or the handler does not have is refused: a
// container without its bandwidth limit is not what was asked for.
func applyClasses(c Container, linux *specs.Linux) error {
	if class, key := classOf(c, rdtContainer, rdtPod); class != "" {
		if !c.Host.RDT {
			return fmt.Errorf("annotations[%q]: RDT class %q: this machine has no resctrl: %w", key, class, errdefs.ErrNotImplemented)
		}
		linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: class}
	}
	if class, key := classOf(c, blockioContainer, blockioPod); class != "" {
		blockio, ok := c.Handler.BlockIO[class]
		if !ok {
			return fmt.Errorf("annotations[%q]: blockio class %q is not configured: %w", key, class, errdefs.ErrNotImplemented)
		}
		linux.Resources.BlockIO = blockio
	}
	return nil
}

// classOf looks a class up where it is named most precisely: by the container
// itself, by its pod for it, by its pod for all.
func classOf(c Container, own, pod string) (class, key string) {
	if v := c.Config.GetAnnotations()[own]; v != "" {
		return v, own
	}
	for _, key := range []string{pod + "container." + c.Config.GetMetadata().GetName(), pod + "pod"} {
		if v := c.Pod.Config.GetAnnotations()[key]; v != "" {
			return v, key
		}
	}
	return "", ""
}
