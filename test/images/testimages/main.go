// Command testimages builds the images that tests pull and serves them from a
// registry on loopback. See package images.
//
//	testimages build -dir DIR
//	testimages serve -dir DIR -addr 127.0.0.1:5000 -certs-d DIR
//
// serve runs until it is told to stop. With a podshim (or containerd) whose
// certs.d directory is the one written, `crictl pull registry.k8s.io/pause:3.9`
// then works on a machine without internet.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/podshim/podshim/test/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testimages:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 || (args[0] != "build" && args[0] != "serve") {
		return fmt.Errorf("usage: testimages build|serve [flags]")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	dir := flags.String("dir", "_artifacts/images", "where built images are kept")
	addr := flags.String("addr", "127.0.0.1:0", "serve: address of the registry")
	certs := flags.String("certs-d", "", "serve: certs.d directory to write hosts.toml files into")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	set, err := images.Build(ctx, *dir)
	if err != nil {
		return err
	}
	if args[0] == "build" {
		for _, image := range set.Images {
			fmt.Println(image.Digest, image.Name)
		}
		return nil
	}
	return serve(ctx, set, *addr, *certs)
}

// serve prints the registry's address as its first line.
func serve(ctx context.Context, set *images.Set, addr, certs string) error {
	server, err := set.Serve(addr)
	if err != nil {
		return err
	}
	if certs != "" {
		if err := server.WriteHosts(certs); err != nil {
			return err
		}
	}
	fmt.Println(server.Addr)
	<-ctx.Done()
	return server.Close()
}
