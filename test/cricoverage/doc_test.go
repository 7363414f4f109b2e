package cricoverage

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// row is one line of a table of docs/cri.md, for one of its names.
type row struct {
	what  string
	tests []string
}

// page is what docs/cri.md says: rows by "RPC" and by "Message.field".
type page struct {
	rows     map[string]row
	messages map[string]bool
}

var quoted = regexp.MustCompile("`([^`]+)`")

func quotedIn(s string) (words []string) {
	for _, m := range quoted.FindAllStringSubmatch(s, -1) {
		words = append(words, m[1])
	}
	return words
}

// readPage reads the tables: those below "## RPCs" are of RPCs, those below a
// "### A, B" of the fields of the messages A and B, each field of which is one of
// either.
func readPage(t *testing.T, a api) page {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(repository, "docs", "cri.md"))
	if err != nil {
		t.Fatal(err)
	}
	p := page{rows: map[string]row{}, messages: map[string]bool{}}
	fields := map[string][]string{}
	for _, m := range a.messages {
		for i := range m.Fields().Len() {
			fields[string(m.Name())] = append(fields[string(m.Name())], string(m.Fields().Get(i).Name()))
		}
	}
	var about []string
	rpcs := false
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "## "):
			rpcs, about = line == "## RPCs", nil
		case strings.HasPrefix(line, "### "):
			about = strings.Split(strings.TrimPrefix(line, "### "), ", ")
			for _, m := range about {
				p.messages[m] = true
			}
		case strings.HasPrefix(line, "| `"):
			cells := strings.Split(strings.Trim(line, "| "), " | ")
			if len(cells) != 3 || strings.TrimSpace(cells[1]) == "" {
				t.Errorf("not three cells: %s", line)
				continue
			}
			for _, name := range quotedIn(cells[0]) {
				var keys []string
				if rpcs {
					keys = []string{name}
				}
				for _, m := range about {
					if slices.Contains(fields[m], name) {
						keys = append(keys, m+"."+name)
					}
				}
				if len(keys) == 0 {
					t.Errorf("%v has no field %s", about, name)
				}
				for _, key := range keys {
					if _, dup := p.rows[key]; dup {
						t.Errorf("%s has two rows", key)
					}
					p.rows[key] = row{cells[1], quotedIn(cells[2])}
				}
			}
		}
	}
	return p
}

// Every RPC and every field of the CRI that go.mod names has a row that says what
// podshim does with it, and no row is about something that is not there.
func TestEveryFieldHasARow(t *testing.T) {
	a := readAPI()
	p := readPage(t, a)
	known := map[string]bool{}
	need := func(key string) {
		known[key] = true
		if _, ok := p.rows[key]; !ok {
			t.Errorf("docs/cri.md has no row for %s", key)
		}
	}
	for _, m := range a.methods {
		need(string(m.Name()))
	}
	for _, m := range a.messages {
		if wrapped(m) {
			continue
		}
		known[string(m.Name())] = true
		if !p.messages[string(m.Name())] {
			t.Errorf("docs/cri.md has no section of %s", m.Name())
		}
		for i := range m.Fields().Len() {
			need(string(m.Name()) + "." + string(m.Fields().Get(i).Name()))
		}
	}
	for key := range p.rows {
		if !known[key] {
			t.Errorf("docs/cri.md has a row for %s, which the CRI has not", key)
		}
	}
	for m := range p.messages {
		if !known[m] {
			t.Errorf("docs/cri.md has a section of %s, which the CRI has not", m)
		}
	}
}

// Every row names tests, and each of them exists.
func TestEveryRowHasATest(t *testing.T) {
	there := tests(t)
	for key, r := range readPage(t, readAPI()).rows {
		if len(r.tests) == 0 {
			t.Errorf("%s: no test is named", key)
		}
		for _, name := range r.tests {
			if !there[name] {
				t.Errorf("%s: there is no test %s", key, name)
			}
		}
	}
}

// Fields that lead to another operating system are said to be refused, or never set.
func TestOtherPlatforms(t *testing.T) {
	a := readAPI()
	p := readPage(t, a)
	for _, m := range a.messages {
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			if key := string(m.Name()) + "." + string(f.Name()); platform(f) && p.rows[key].what != "refused" && p.rows[key].what != "never set" {
				t.Errorf("%s: %q", key, p.rows[key].what)
			}
		}
	}
}

// What TestCoverage may leave unseen is said to be never set.
func TestUnseenIsNeverSet(t *testing.T) {
	p := readPage(t, readAPI())
	for key := range unseen {
		if p.rows[key].what != "never set" {
			t.Errorf("%s: %q", key, p.rows[key].what)
		}
	}
}

const repository = "../.."

var testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)

// tests are all of the repository, as "last directory/TestName".
func tests(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for _, dir := range []string{"cmd", "internal", "test"} {
		err := filepath.WalkDir(filepath.Join(repository, dir), func(file string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, "_test.go") {
				return err
			}
			raw, err := os.ReadFile(file)
			for _, m := range testFunc.FindAllStringSubmatch(string(raw), -1) {
				found[path.Join(filepath.Base(filepath.Dir(file)), m[1])] = true
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}
