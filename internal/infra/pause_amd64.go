package infra

import _ "embed"

//go:embed pause/pause-amd64
var pause []byte
