package image

import (
	"io"
	"log"
	"testing"
)

var discardLog = log.New(io.Discard, "", 0)

func TestPullMountsWhatWasPushed(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	img := imageOf(t,
		layerOf(t, dir("etc", 0o755), file("etc/name", "lower"), file("etc/gone", "x")),
		layerOf(t, file("etc/name", "upper"), file("etc/.wh.gone", "")))
	got := mustPull(t, s, srv.push(t, "app:v1", img))
	if got.ID != idOf(t, img) {
		t.Errorf("ID %s, want %s", got.ID, idOf(t, img))
	}
	root := mounted(t, s, "c1", got)
	if b := read(t, root, "etc/name"); b != "upper" {
		t.Errorf("etc/name = %q", b)
	}
}
