// Package chart tests what is installed: the Helm chart and the kustomization,
// rendered and on a real API server, with the product's processes having no
// rights but those that are installed. The tests have the build tag e2echart.
package chart
