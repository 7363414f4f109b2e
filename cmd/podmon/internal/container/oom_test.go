package container

import "testing"

func TestIsVictim(t *testing.T) {
	const told = "Memory cgroup out of memory: Killed process 885 (tail) total-vm:19016kB, anon-rss:15872kB, UID:0 pgtables:76kB oom_score_adj:0\n"
	for record, want := range map[string]bool{
		"3,1234,6997451645,-;" + told:                             true,
		"3,1,6997,-;Out of memory: Killed process 885 (a b) x\n":  true,
		"3,1,6997,-;Killed process 885 (mysqld) total-vm:1kB\n":   true,  // before Linux 4.19
		"11,1234,6997451645,-;" + told:                            false, // a process wrote it
		"3,1,6997,-;Out of memory: Killed process 88 (a) x\n":     false,
		"3,1,6997,-;Out of memory: Killed process 1885 (a) x\n":   false,
		"6,1,6997,-;oom-kill:task_memcg=/x,task=tail,pid=885\n":   false,
		"6,1,6997,-;oom_reaper: reaped process 885 (tail), now\n": false,
		"": false,
	} {
		if got := isVictim(kernelText([]byte(record)), 885); got != want {
			t.Errorf("%q: %v", record, got)
		}
	}
}

func TestIsVictimOf(t *testing.T) {
	const begin = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=podshim-abc123.scope,mems_allowed=0,"
	for text, want := range map[string]bool{
		begin + "oom_memcg=/a.slice/podshim-abc123.scope,task_memcg=/a.slice/podshim-abc123.scope,task=dd,pid=7,uid=0\n": true,
		begin + "oom_memcg=/a.slice,task_memcg=/a.slice/podshim-abc123.scope,task=dd,pid=7,uid=0\n":                      true,
		begin + "oom_memcg=/a.slice,task_memcg=/a.slice/podshim-def456.scope,task=dd,pid=7,uid=0\n":                      false,
		begin + "oom_memcg=/a.slice,task_memcg=/a.slice/podshim-def456.scope,task=abc123,pid=7,uid=0\n":                  false,
		"dd invoked oom-killer: ,task_memcg=/abc123,task=dd\n":                                                           false,
	} {
		if got := isVictimOf([]byte(text), "abc123"); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
