package infra

import _ "embed"

//go:embed pause/pause-arm64
var pause []byte
