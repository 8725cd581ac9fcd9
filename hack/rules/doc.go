// Package rules tests the alerts and the dashboard of the chart with
// Prometheus' own parser and engine. It is a module of its own, because only
// these tests need Prometheus.
package rules
