"""Virtual machine drivers behind one seam (`cube.vm.seam`).

A driver turns a MachineSpec into a running Machine: memory, processors, disks and one byte channel
to the agent inside. It must know nothing of images, containers or pods. The driver owns the process
and the private directory it was given until `stop` returns.
"""
