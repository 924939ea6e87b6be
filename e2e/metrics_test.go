// What Prometheus reads of /metrics: its own parser, and its own rules for names.
package e2e

import (
	"bytes"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	dto "github.com/prometheus/client_model/go"
)

// What Prometheus 3 sends when it scrapes.
const scrape = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5," +
	"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"

func TestPrometheus(t *testing.T) {
	t.Parallel()
	request, err := http.NewRequestWithContext(t.Context(), "GET", startDaemon(t, freePort(t))+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept", scrape)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", response.Status, err)
	}
	if format := expfmt.ResponseFormat(response.Header); format.FormatType() != expfmt.TypeTextPlain {
		t.Errorf("%q is not the text format", response.Header.Get("Content-Type"))
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	want := strings.Fields(`envd_cpu_used_ratio envd_cpus envd_disk_size_bytes envd_disk_used_bytes envd_memory_cache_bytes
		envd_memory_size_bytes envd_memory_used_bytes envd_oom_kills_total envd_open_fds envd_output_lost_bytes_total
		envd_processes_running envd_resident_memory_bytes envd_restores_total envd_streams_open envd_watch_overflows_total`)
	var names []string
	for name, family := range families {
		names = append(names, name)
		kind := dto.MetricType_GAUGE
		if strings.HasSuffix(name, "_total") {
			kind = dto.MetricType_COUNTER
		}
		if family.GetType() != kind || family.GetHelp() == "" || len(family.GetMetric()) != 1 {
			t.Errorf("%v", family)
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, want) {
		t.Errorf("got  %q\nwant %q", names, want)
	}
	if cpus := families["envd_cpus"].GetMetric()[0].GetGauge().GetValue(); cpus < 1 {
		t.Errorf("%v CPUs", cpus)
	}
}
