package cri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sized is a container whose message has at least n bytes.
func sized(id string, n int) *runtime.Container {
	return &runtime.Container{Id: id, Annotations: map[string]string{"filler": strings.Repeat("x", n)}}
}

// A stream has each item once, in order, and makes an item only when its batch is
// due: it holds one message, whatever the length of the list.
func TestSendAllHoldsOneMessage(t *testing.T) {
	const n = 1000
	ids := make([]string, n)
	for i := range ids {
		ids[i] = strings.Repeat("i", 1+i%7) + string(rune('a'+i%26))
	}
	ids[500] = "large"
	made, sent, largest := 0, []string(nil), 0
	item := func(id string) *runtime.Container {
		made++
		switch {
		case id == "large":
			return sized(id, 3*batchSize)
		case made%10 == 0:
			return nil
		}
		return sized(id, 1000)
	}
	err := sendAll(context.Background(), ids, item, func(batch []*runtime.Container) error {
		size := 0
		for _, c := range batch {
			sent = append(sent, c.Id)
			size += len(c.Id) + len(c.Annotations["filler"])
		}
		if len(batch) > 1 && size > batchSize {
			t.Errorf("a message of %d items has %d bytes", len(batch), size)
		}
		largest = max(largest, len(batch))
		if ahead := made - made/10 - len(sent); ahead > 2 {
			t.Errorf("%d items were made before their turn", ahead)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for i, id := range ids {
		if id == "large" || (i+1)%10 != 0 {
			want = append(want, id)
		}
	}
	if !slices.Equal(sent, want) {
		t.Errorf("%d items were sent, want %d, each once and in order", len(sent), len(want))
	}
	if largest < 50 {
		t.Errorf("the largest message has %d items: one message for each is a waste", largest)
	}
}

func TestSendAllEnds(t *testing.T) {
	item := func(id string) *runtime.Container { return sized(id, batchSize) }
	broken := errors.New("client is gone")
	calls := 0
	err := sendAll(context.Background(), []string{"a", "b", "c", "d"}, item, func([]*runtime.Container) error {
		calls++
		return broken
	})
	if !errors.Is(err, broken) || calls != 1 {
		t.Errorf("after %d sends: %v", calls, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	calls = 0
	err = sendAll(ctx, []string{"a", "b", "c", "d"}, item, func([]*runtime.Container) error {
		calls++
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || calls != 1 {
		t.Errorf("after %d sends: %v", calls, err)
	}
	if err := sendAll(context.Background(), nil, item, func([]*runtime.Container) error {
		t.Error("an empty list has a message")
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestTooLargeForOneMessage(t *testing.T) {
	resp := &runtime.ListContainersResponse{Containers: []*runtime.Container{sized("c", 1000)}}
	if err := fits(runtime.RuntimeService_ListContainers_FullMethodName, resp, 10_000); err != nil {
		t.Error(err)
	}
	for method, word := range map[string]string{
		runtime.RuntimeService_ListContainers_FullMethodName:  "StreamContainers",
		runtime.RuntimeService_ContainerStatus_FullMethodName: "cri.max_message_size",
	} {
		err := fits(method, resp, 1000)
		if codeOf(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v; want ResourceExhausted that says %s", method, err, word)
		}
	}
}
