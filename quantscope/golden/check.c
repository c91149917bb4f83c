/* Compares an engine's float files with those of a golden pack, in the order of index.txt.

       cc -O2 -o check check.c -lm && ./check PACK MINE [ONLY]

   MINE holds files of the same names as the pack, raw little-endian float32 in row-major order, as many of them as the engine can
   write; ONLY is the beginning of the names to look at ("one/").  Exit code 0: all that was compared is within its tolerance,
   1: something is not, 2: nothing was compared or a file cannot be read. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float *load(const char *folder, const char *name, long *n) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    long bytes = ftell(f);
    rewind(f);
    float *x = malloc(bytes > 0 ? bytes : 1);
    *n = x && fread(x, 1, bytes, f) == (size_t)bytes && bytes % 4 == 0 ? bytes / 4 : -1;
    fclose(f);
    return x;
}

int main(int argc, char **argv) {
    if (argc < 3) { fprintf(stderr, "usage: check PACK MINE [ONLY]\n"); return 2; }
    char path[4096], line[2048], expected[512], mine[512], first[512] = "";
    snprintf(path, sizeof path, "%s/index.txt", argv[1]);
    FILE *index = fopen(path, "r");
    if (!index) { fprintf(stderr, "%s: cannot be read\n", path); return 2; }
    long n, n_ref, n_test, right = 0, wrong = 0, missing = 0;
    double tolerance;
    while (fgets(line, sizeof line, index)) {
        if (sscanf(line, "%511s %511s %ld %lf", expected, mine, &n, &tolerance) != 4 || line[0] == '#') continue;
        if (argc > 3 && strncmp(mine, argv[3], strlen(argv[3]))) continue;
        float *test = load(argv[2], mine, &n_test);
        if (!test) { missing++; continue; }
        float *ref = load(argv[1], expected, &n_ref);
        if (!ref || n_ref != n) { fprintf(stderr, "%s: the pack is damaged\n", expected); return 2; }
        double error = 0, square = 0, largest = -1;
        long at = 0;
        for (long i = 0; n_test == n && i < n; i++) {
            double d = (double)ref[i] - test[i];
            error += d * d;
            square += (double)ref[i] * ref[i];
            if (!(fabs(d) <= largest) && largest == largest) { largest = fabs(d); at = i; }
        }
        double nmse = error == 0 ? 0 : error / square;
        int good = n_test == n && nmse <= tolerance; /* false for a NaN */
        if (n_test != n) printf("FAIL %-32s %ld values, expected %ld\n", mine, n_test, n);
        else printf("%s %-32s NMSE %.3g of %.3g; value %ld: expected %.9g, found %.9g\n", good ? "ok  " : "FAIL", mine, nmse, tolerance, at, ref[at], test[at]);
        if (good) right++;
        else if (!wrong++) strcpy(first, mine);
        free(ref);
        free(test);
    }
    fclose(index);
    printf("%ld within tolerance, %ld not, %ld files of the pack not found in %s\n", right, wrong, missing, argv[2]);
    if (wrong) printf("first failure: %s (README.md says what it means)\n", first);
    return wrong ? 1 : right ? 0 : 2;
}
