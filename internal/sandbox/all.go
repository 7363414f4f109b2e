package sandbox

// All returns every sandbox on record, those that are being made and those whose
// making failed too, in no order.
func (m *Manager) All() []*Record { return m.all.Records() }

// Damaged returns the IDs of the records that cannot be read.
func (m *Manager) Damaged() []string { return m.all.Unreadable() }
