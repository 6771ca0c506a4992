/* Prints this host's time-stamp counter frequency in kHz, or 0 where there is none. An emulated
 * microvm has no second clock to calibrate by, so its kernel is told (tsc_early_khz).
 */
#include <stdio.h>
#include <time.h>

#if defined(__x86_64__)
#include <x86intrin.h>

int main(void)
{
    struct timespec from, to, pause = {.tv_nsec = 50000000};
    clock_gettime(CLOCK_MONOTONIC_RAW, &from);
    unsigned long long before = __rdtsc();
    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC_RAW, &to);
    unsigned long long after = __rdtsc();
    double elapsed = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    printf("%.0f\n", (double)(after - before) * 1e6 / elapsed);
    return 0;
}
#else
int main(void)
{
    puts("0");
    return 0;
}
#endif
