package cni

import "github.com/podshim/podshim/internal/host"

// Of fewer pods than manyPods, and of forgetEvery more of them, the node's cache of /proc/sys is not felt.
// Those that an earlier daemon attached do not count: it has forgotten them.
const (
	manyPods    = 32
	forgetEvery = 16
)

// forgetDue counts a pod that is attached now, and tells whether it is one of those with which it is
// time to forget.
func (n *Network) forgetDue() bool {
	n.mu.Lock()
	pods := len(n.live)
	n.mu.Unlock()
	return n.added.Add(1)%forgetEvery == 0 && pods >= manyPods
}

// forgetProc has the node forget what plugins had it cache of pods' /proc/sys, by which every look-up of
// a plugin's passes (host.ForgetProc). Nobody waits for it: how long it takes is the node's affair.
func (n *Network) forgetProc() {
	if !n.forgetDue() || !n.forgetting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer n.forgetting.Store(false)
		if err := host.ForgetProc(); err != nil {
			n.cfg.Log.WithError(err).Debug("what is cached of pods' /proc/sys is kept")
		}
	}()
}
