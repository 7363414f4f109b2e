package image

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// credentials are an Auth made ready: for which host, and in which form.
type credentials struct {
	host     string // "" gets nothing
	username string // "" with a secret: the secret is a refresh token
	secret   string
	bearer   string // a token to be sent as it is
}

// newCredentials reads the forms of CRI's AuthConfig. Without a server address the
// credentials are for the registry in the image's name, and for no mirror of it:
// an operator who wants one to get them sets its header in hosts.toml.
func newCredentials(auth *Auth, registry string) (credentials, error) {
	if auth == nil || *auth == (Auth{}) {
		return credentials{}, nil
	}
	c := credentials{host: canonicalHost(registry)}
	if auth.ServerAddress != "" {
		host, err := serverHost(auth.ServerAddress)
		if err != nil {
			return credentials{}, err
		}
		c.host = host
	}
	switch {
	case auth.RegistryToken != "":
		c.bearer = auth.RegistryToken
	case auth.IdentityToken != "":
		c.secret = auth.IdentityToken
	case auth.Username == "<token>": // what Docker's credential helpers call an identity token
		c.secret = auth.Password
	case auth.Username != "":
		c.username, c.secret = auth.Username, auth.Password
	case auth.Auth != "":
		var err error
		if c.username, c.secret, err = decodeAuth(auth.Auth); err != nil {
			return credentials{}, err
		}
	}
	return c, nil
}

// decodeAuth reads base64("user:password"), padded or not. Its errors show nothing
// of it.
func decodeAuth(s string) (user, password string, err error) {
	data, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(s, "="))
	if err != nil {
		return "", "", fmt.Errorf("auth of the image's credentials is not base64: %w", errdefs.ErrInvalidArgument)
	}
	user, password, ok := strings.Cut(string(data), ":")
	if !ok || user == "" {
		return "", "", fmt.Errorf("auth of the image's credentials is not user:password: %w", errdefs.ErrInvalidArgument)
	}
	return user, strings.Trim(password, "\x00"), nil
}

// serverHost returns the host of "https://host:port/path" or "host:port/path".
func serverHost(address string) (string, error) {
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" {
		return "", fmt.Errorf("server address of the image's credentials is not an address: %w", errdefs.ErrInvalidArgument)
	}
	return canonicalHost(u.Host), nil
}

// canonicalHost makes the ways to write one registry equal.
func canonicalHost(host string) string {
	host = strings.ToLower(host)
	if h, port, err := net.SplitHostPort(host); err == nil && port == "443" {
		host = h
	}
	switch host {
	case "index.docker.io", "registry-1.docker.io", "www.docker.io":
		return "docker.io"
	}
	return host
}

func (c credentials) forHost(host string) bool {
	return c.host != "" && canonicalHost(host) == c.host
}

// basic is the library's way to ask: user name and secret for a host.
func (c credentials) basic(host string) (string, string, error) {
	if !c.forHost(host) {
		return "", "", nil
	}
	return c.username, c.secret, nil
}

// secrets are the strings that may appear in no message.
func (c credentials) secrets() []string {
	var all []string
	for _, s := range []string{c.secret, c.bearer} {
		if s != "" {
			all = append(all, s, url.QueryEscape(s), base64.StdEncoding.EncodeToString([]byte(c.username+":"+s)))
		}
	}
	return all
}

// bearerAuthorizer sends a ready token to the one host it is for.
type bearerAuthorizer struct {
	credentials credentials
	next        docker.Authorizer // for all other hosts
}

func (b bearerAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	if b.credentials.forHost(req.URL.Host) {
		req.Header.Set("Authorization", "Bearer "+b.credentials.bearer)
		return nil
	}
	return b.next.Authorize(ctx, req)
}

func (b bearerAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	if last := responses[len(responses)-1]; b.credentials.forHost(last.Request.URL.Host) {
		return fmt.Errorf("registry refuses the registry token: %w", docker.ErrInvalidAuthorization)
	}
	return b.next.AddResponses(ctx, responses)
}
