// Only in the binary that `make profile` builds, laid over the daemon's source: SIGUSR1 starts a CPU profile, the next one writes it
// and profiles of the heap and the goroutines into $ENVD_PROFILE.
package main

import (
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"syscall"
)

func init() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	go func() {
		create := func(name string) *os.File {
			file, err := os.Create(filepath.Join(os.Getenv("ENVD_PROFILE"), name+".pprof"))
			if err != nil {
				panic(err)
			}
			return file
		}
		<-signals
		cpu := create("cpu")
		pprof.StartCPUProfile(cpu)
		<-signals
		pprof.StopCPUProfile()
		cpu.Close()
		runtime.GC() // the heap profile is as of the last collection
		for _, name := range []string{"heap", "goroutine"} {
			file := create(name)
			pprof.Lookup(name).WriteTo(file, 0)
			file.Close()
		}
		os.WriteFile(filepath.Join(os.Getenv("ENVD_PROFILE"), "done"), nil, 0o644)
	}()
}
