"""What a pod is: manifests in, one typed model out.

Everything here is pure: bytes of YAML are parsed under caps, checked against the Kubernetes fields
(and UCloud's dialect of them) that cube honours, and normalised to `cube.pod.model`. It must never
start, read or fetch anything; what it cannot honour it refuses by the field's name and line.
"""
