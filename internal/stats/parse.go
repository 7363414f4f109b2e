package stats

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unlimited stands for "no limit" in v1's byte counters, which say a number a
// page short of 2^63, and "max" in v2's. No machine has half of it.
const unlimited = uint64(1) << 62

// buffers spare each read its buffer.
var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, 8<<10)
	return &b
}}

// number reads a file that holds one number; "max" is math.MaxUint64.
func number(dir, name string) (uint64, error) {
	var room [64]byte
	raw, err := readShown(dir, name, room[:0])
	if err != nil {
		return 0, err
	}
	v, err := parseNumber(bytes.TrimSpace(raw))
	if err != nil {
		return 0, fmt.Errorf("read %s/%s: %w", dir, name, err)
	}
	return v, nil
}

func parseNumber(raw []byte) (uint64, error) {
	if string(raw) == "max" {
		return math.MaxUint64, nil
	}
	return strconv.ParseUint(string(raw), 10, 64)
}

var errMissingKeys = errors.New("the kernel does not tell all the numbers wanted")

// keyed reads a file of "KEY NUMBER" lines and stores the numbers of the keys
// that into has; one that is missing is an error, not a zero.
func keyed(dir, name string, into map[string]*uint64) error {
	room := buffers.Get().(*[]byte)
	defer buffers.Put(room)
	raw, err := readShown(dir, name, *room)
	if err != nil {
		return err
	}
	found := 0
	for line := range bytes.Lines(raw) {
		key, rest, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if !ok {
			continue
		}
		target, wanted := into[string(key)] // does not allocate
		if !wanted {
			continue
		}
		v, err := parseNumber(rest)
		if err != nil {
			return fmt.Errorf("read %s/%s: %s: %w", dir, name, key, err)
		}
		*target = v
		found++
	}
	if found < len(into) {
		return fmt.Errorf("read %s/%s: %d of %d: %w", dir, name, found, len(into), errMissingKeys)
	}
	return nil
}

// pressure reads a PSI file:
//
//	some avg10=0.00 avg60=0.00 avg300=0.00 total=123456
//	full avg10=0.00 avg60=0.00 avg300=0.00 total=12345
//
// Totals are microseconds there and nanoseconds in the CRI.
func pressure(dir, name string) (*runtime.PsiStats, error) {
	room := buffers.Get().(*[]byte)
	defer buffers.Put(room)
	raw, err := readShown(dir, name, *room)
	if err != nil {
		return nil, err
	}
	psi := &runtime.PsiStats{}
	for line := range bytes.Lines(raw) {
		fields := bytes.Fields(line)
		if len(fields) == 0 {
			continue
		}
		data, err := psiLine(fields[1:])
		if err != nil {
			return nil, fmt.Errorf("read %s/%s: %w", dir, name, err)
		}
		switch string(fields[0]) {
		case "some":
			psi.Some = data
		case "full":
			psi.Full = data
		}
	}
	return psi, nil
}

func psiLine(fields [][]byte) (*runtime.PsiData, error) {
	d := &runtime.PsiData{}
	for _, f := range fields {
		key, val, ok := bytes.Cut(f, []byte("="))
		if !ok {
			return nil, fmt.Errorf("%q is no KEY=VALUE", f)
		}
		var err error
		switch string(key) {
		case "avg10":
			d.Avg10, err = strconv.ParseFloat(string(val), 64)
		case "avg60":
			d.Avg60, err = strconv.ParseFloat(string(val), 64)
		case "avg300":
			d.Avg300, err = strconv.ParseFloat(string(val), 64)
		case "total":
			d.Total, err = strconv.ParseUint(string(val), 10, 64)
			d.Total *= 1000
		}
		if err != nil {
			return nil, err
		}
	}
	return d, nil
}
