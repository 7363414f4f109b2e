package monitor

// CutConnections breaks the connections to all podmons.
func (m *Monitor) CutConnections() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for l := range m.links {
		l.conn.Close()
	}
}
