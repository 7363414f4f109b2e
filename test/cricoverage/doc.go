// Package cricoverage holds podshim to the whole of the CRI that go.mod names.
//
//	doc_test.go       docs/cri.md has a row for every RPC and every field, and each
//	                  row names tests that exist; from the proto's descriptors, so
//	                  that a new cri-api fails until what is new has its row
//	coverage_test.go  TestCoverage calls every RPC and sets every field on a podshim
//	                  of its own, and counts what was answered, accepted, or refused
//	                  by name (make cri-coverage)
//
// A field that is accepted may still mean nothing: that it means what it says is
// shown by the tests that docs/cri.md names.
package cricoverage
