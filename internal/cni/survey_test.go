package cni

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A reservation without an owner is one that a plugin is about to write, or was killed over.
func TestReservationOfNobody(t *testing.T) {
	dir := t.TempDir()
	r := Reservation{Path: filepath.Join(dir, "10.9.8.7"), IP: "10.9.8.7"}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	write := func(text string) {
		if err := os.WriteFile(r.Path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if r.Held() {
		t.Error("held for nobody while a plugin is at work")
	}
	if err := (&Network{}).Free(t.Context(), r); err == nil {
		t.Error("freed while a plugin is at work")
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if !r.Held() {
		t.Error("not held when no plugin is at work")
	}
	write("abc\r\neth0")
	if r.Held() {
		t.Error("held for nobody, and for a pod")
	}
	if err := (&Network{}).Free(t.Context(), r); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(r.Path); err != nil {
		t.Errorf("another pod's reservation: %v", err)
	}
	write("")
	if err := (&Network{}).Free(t.Context(), r); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(r.Path); err == nil {
		t.Error("not freed")
	}
}
