package config

import (
	"bytes"
	"fmt"
	"strings"
)

// Key describes one key of default.toml.
type Key struct {
	// Name is the whole key, "cri.socket".
	Name string
	// Default is its default as TOML, on one line.
	Default string
	// Doc is the comment above it, on one line.
	Doc string
}

// Keys lists every key in the order of default.toml.
func Keys() []Key {
	var (
		keys  []Key
		table string
		doc   []string
	)
	lines := strings.Split(string(defaultFile), "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		switch {
		case line == "":
			doc = nil
		case strings.HasPrefix(line, "#"):
			doc = append(doc, strings.TrimSpace(line[1:]))
		case strings.HasPrefix(line, "["):
			table, doc = strings.Trim(line, "[]")+".", nil
		default:
			name, value, _ := strings.Cut(line, " = ")
			for ; value == "[" || strings.HasSuffix(value, ","); i++ {
				value += " " + strings.TrimSpace(lines[i+1])
			}
			value = strings.NewReplacer("[ ", "[", ", ]", "]").Replace(value)
			keys = append(keys, Key{Name: table + name, Default: value, Doc: strings.Join(doc, " ")})
			doc = nil
		}
	}
	return keys
}

// Doc returns the description and the default (as TOML) of the key called name;
// it reports false when there is no such key.
func Doc(name string) (Key, bool) {
	for _, k := range Keys() {
		if k.Name == name {
			return k, true
		}
	}
	return Key{}, false
}

// Markdown renders the list of all keys, which is the reference part of
// docs/config.md.
func Markdown() []byte {
	var buf bytes.Buffer
	table := "?"
	for _, k := range Keys() {
		t, name := "", k.Name
		if i := strings.LastIndexByte(k.Name, '.'); i >= 0 {
			t, name = k.Name[:i], k.Name[i+1:]
		}
		if t != table {
			title := "Outside any table"
			if t != "" {
				title = "`[" + t + "]`"
			}
			fmt.Fprintf(&buf, "\n## %s\n", title)
			table = t
		}
		fmt.Fprintf(&buf, "\n**`%s`** (default `%s`)\n\n%s\n", name, k.Default, k.Doc)
	}
	return buf.Bytes()
}
